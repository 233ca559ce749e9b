"""The peak memory of the fullest rank so far."""

from __future__ import annotations

import resource

import torch
from torch import distributed


def largest_memory(device: torch.device) -> int:
    """Peak bytes of the rank that used most: device memory on a GPU, resident memory on CPU. Collective."""
    if device.type == "cuda":
        used = torch.cuda.max_memory_allocated(device)
    else:
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = torch.tensor([used], dtype=torch.int64, device=device)
    distributed.all_reduce(peak, op=distributed.ReduceOp.MAX)
    return int(peak)
