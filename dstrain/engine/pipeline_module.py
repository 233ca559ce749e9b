"""What DeepSpeed's engines train: a PipelineModule partitioned as planned, or all layers in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.runtime.pipe.dualpipev import DualPipeVModule
from deepspeed.runtime.pipe.module import LayerSpec, PipelineModule
from deepspeed.runtime.pipe.topology import ProcessTopology
from torch import nn
from torch.utils.checkpoint import checkpoint

from dstrain.control_group import barrier
from dstrain.engine.zero3 import zero3_init
from dstrain.lora import base_name
from dstrain.model.document_lengths import DocumentLengths, note_lengths
from dstrain.model.head_output import HeadOutputRequest
from dstrain.model.layers import BlockLayer, HeadLayer
from dstrain.model.pipeline_model import PipelineModel


def make_topology(*, pipeline: int, data_parallel: int) -> ProcessTopology:
    """rank = replica x pipeline + stage.

    DeepSpeed's own ``PipeDataParallelTopology`` numbers the replicas of a stage next to each other,
    so that a pipeline would cross machines while its replicas share one.
    """
    return ProcessTopology(axes=["data", "pipe"], dims=[data_parallel, pipeline])


def recompute(function: Callable[..., Any], *inputs: Any) -> Any:
    """torch's non-reentrant checkpoint, for both engines.

    DeepSpeed's own two forms are not used: the reentrant one, its default, cuts off the gradient of an
    embedding inside it, and its non-reentrant one does not gather ZeRO-3's parameters again.
    """
    return checkpoint(function, *inputs, use_reentrant=False)


class _LayerOf(LayerSpec):  # type: ignore[misc]
    """The spec of one layer of a model: building it gives the model's own layer."""

    def __init__(self, model: PipelineModel, index: int) -> None:
        super().__init__(nn.Module)
        self.model = model
        self.index = index

    def build(self, log: bool = False) -> nn.Module:
        return self.model.build(self.index)


def _given(outputs: torch.Tensor, labels: object) -> torch.Tensor:
    """The loss function that DeepSpeed wants: the head has computed the loss already, while its weights were there."""
    return outputs


class StagedModule(PipelineModule):  # type: ignore[misc]
    """The local stage of a `PipelineModel`.

    What it changes in PipelineModule: the cut comes from the plan (upstream's ``parameters`` method
    builds every layer on every rank only to count); a tied weight is one parameter of each of its
    layers, not a whole module (a ``TiedLayerSpec`` around the head would take the head's norm out of
    the gradient norm); nothing is printed.
    """

    documents: DocumentLengths | None = None
    """Of the micro-batch that is computed next, where they are known."""

    def __init__(
        self,
        model: PipelineModel,
        *,
        cut: Sequence[int],
        pipeline: int,
        data_parallel: int,
        deepspeed: dict[str, Any],
    ) -> None:
        self._model = model
        self._deepspeed = deepspeed
        self._cut = list(cut)
        self._tied = model.tied
        super().__init__(
            layers=[_LayerOf(model, index) for index in range(model.num_layers)],
            topology=make_topology(pipeline=pipeline, data_parallel=data_parallel),
            loss_fn=_given,
            checkpointable_layers=["BlockLayer"],
        )

    @property
    def head(self) -> HeadLayer | None:
        """The model's head, where this rank holds it."""
        return next((layer for layer in self.children() if isinstance(layer, HeadLayer)), None)

    def forward(self, forward_input: Any) -> Any:
        note_lengths(forward_input[1], self.documents)
        return super().forward(forward_input)

    def _build(self) -> None:
        self._model.after_build = zero3_init(self._deepspeed, self.mpu())
        super()._build()
        barrier()  # the training's groups wait for no rank that reads its weights from a slow disk

    def _partition_layers(self, method: str = "") -> None:
        self.parts = self._cut
        self._set_bounds(self.parts[self.stage_id], self.parts[self.stage_id + 1])

    def _synchronize_tied_weights(self) -> None:
        barrier()  # as for the weights: the checkpoint has just been read
        super()._synchronize_tied_weights()

    def _index_tied_modules(self) -> dict[str, dict[str, Any]]:
        """The copies of each tied weight that lie on different stages, with their process group."""
        comms: dict[str, dict[str, Any]] = {}
        for tied in self._tied:
            stages = sorted({self.stage_owner(layer) for layer, _ in tied.owners})
            if len(stages) == 1:
                continue
            for replica in range(self._grid.data_parallel_size):
                ranks = [self._grid.stage_to_global(stage_id=stage, data=replica) for stage in stages]
                group = dist.new_group(ranks=ranks)
                if self.global_rank not in ranks:
                    continue
                weight: Any = self._local_weight(tied.owners)
                weight.ds_pipe_replicated = self.global_rank != ranks[0]
                comms[tied.key] = {
                    "ranks": ranks,
                    "group": group,
                    "weight_attr": ["weight"],
                    "module": _Holder(weight),
                }
        return comms

    def _local_weight(self, owners: Sequence[tuple[int, str]]) -> nn.Parameter:
        """This stage's copy of a tied weight."""
        local: dict[str, nn.Parameter] = {
            base_name(name): parameter for name, parameter in self.named_parameters(remove_duplicate=False)
        }
        for layer, path in owners:
            if f"{layer}.{path}" in local:
                return local[f"{layer}.{path}"]
        raise ValueError(f"none of {owners} lies on stage {self.stage_id}")

    def get_tied_weights_and_groups(self) -> list[tuple[nn.Parameter, object]]:
        return [(comm["module"].weight, comm["group"]) for comm in self.tied_comms.values()]


class DualPipeVStagedModule(DualPipeVModule, StagedModule):  # type: ignore[misc]
    """The same for DualPipeV, where rank r holds stages r and 2 x ranks - 1 - r; ``cut`` has all of these.

    The first and the last stage share rank 0: their tied weights are one parameter there.
    """


class _Holder:
    """What DeepSpeed expects of a tied module, without registering the weight a second time."""

    def __init__(self, weight: nn.Parameter) -> None:
        self.weight = weight

    def parameters(self) -> list[torch.Tensor]:
        return [self.weight]


class SingleStageModel(nn.Module):
    """``(input_ids, position_ids)`` [B, S] -> what the head is asked for. Parameters are named as in a pipeline.

    Args:
        activation_checkpointing: recompute each block in the backward pass (not the embedding and
            the head), non-reentrantly: a reentrant checkpoint around the embedding would cut its
            gradient off.
    """

    def __init__(self, model: PipelineModel, *, activation_checkpointing: bool) -> None:
        super().__init__()
        for index in range(model.num_layers):
            self.add_module(str(index), model.build(index))
        self.activation_checkpointing = activation_checkpointing

    @property
    def head(self) -> HeadOutputRequest:
        last = self._modules[str(len(self._modules) - 1)]
        assert isinstance(last, HeadOutputRequest)
        return last

    def forward(self, inputs: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        state: Any = inputs
        for layer in self.children():
            if self.activation_checkpointing and self.training and isinstance(layer, BlockLayer):
                state = recompute(layer, state)
            else:
                state = layer(state)
        output: torch.Tensor = state
        return output
