"""The plan's layout as a DeepSpeed topology: the stages of one replica have consecutive ranks."""

from __future__ import annotations

from deepspeed.runtime.pipe.topology import ProcessTopology


def make_topology(*, pipeline: int, data_parallel: int) -> ProcessTopology:
    """rank = replica x pipeline + stage.

    DeepSpeed's own ``PipeDataParallelTopology`` numbers the replicas of a stage next to each other,
    so that a pipeline would cross machines while its replicas share one.
    """
    return ProcessTopology(axes=["data", "pipe"], dims=[data_parallel, pipeline])
