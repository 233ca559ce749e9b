"""Initialises the process group of this rank."""

from __future__ import annotations

import deepspeed


def start_communication() -> None:
    """Initialise ``torch.distributed`` through DeepSpeed, with the rank and address that the launcher gave.

    On CPUs DeepSpeed first compiles an all-reduce through shared memory, for about a minute, and keeps
    64 MB in /dev/shm for each rank, which stay there when it is killed. Only inference calls it
    (``deepspeed.comm.inference_all_reduce``): training takes torch's collectives. So it is left out.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False)
