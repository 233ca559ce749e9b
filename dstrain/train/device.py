"""The device of a rank: its peak memory, and ``deterministic: true``, the same bits each time."""

from __future__ import annotations

import resource

import torch
from torch import distributed


def be_deterministic() -> None:
    """For this process, before anything is computed.

    An operation without a deterministic implementation raises RuntimeError from now on. The variables that cuBLAS and
    flash attention read are set by the launch (``dstrain.launch.environment``): they are read when these are loaded.

    Source: https://docs.pytorch.org/docs/stable/notes/randomness.html
    """
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


def largest_memory(device: torch.device) -> int:
    """Peak bytes of the rank that used most: device memory on a GPU, resident memory on CPU. Collective."""
    if device.type == "cuda":
        used = torch.cuda.max_memory_allocated(device)
    else:
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = torch.tensor([used], dtype=torch.int64, device=device)
    distributed.all_reduce(peak, op=distributed.ReduceOp.MAX)
    return int(peak)
