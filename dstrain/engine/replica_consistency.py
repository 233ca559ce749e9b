"""The replica consistency check: replicas and tied weights must be bit-identical during training.

A sum of each weight's bits is compared, which costs one read of the weights and two small collectives.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed import comm as dist

_PIECE = 1 << 22  # elements: 64 MB while they are looked at
_AS_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


class ReplicasDifferError(RuntimeError):
    """Ranks that must hold the same weights do not."""


def check_replicas(engine: Any) -> None:
    """Compare the replicas of each stage, and the copies of each tied weight. Collective.

    Raises:
        ReplicasDifferError: they differ, on every rank of the group that they differ in.
    """
    module = engine.module
    if not engine.zero_optimization_partition_weights():  # ZeRO-3 keeps no copies among replicas
        group = engine.mpu.get_data_parallel_group() if engine.mpu is not None else dist.get_world_group()
        names, weights = zip(*module.named_parameters(), strict=True)
        _compare(list(names), list(weights), group, "the replicas of this stage")
    if engine.mpu is not None:
        for key, comm in module.tied_comms.items():
            _compare([key], [comm["module"].weight], comm["group"], "the stages that tie it")


def _compare(names: list[str], weights: list[torch.nn.Parameter], group: Any, among: str) -> None:
    sums = torch.stack([fingerprint(getattr(weight, "ds_tensor", weight)) for weight in weights])
    lowest, highest = sums.clone(), sums.clone()
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN, group=group)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
    differing = [
        name for name, same in zip(names, (lowest == highest).all(1).tolist(), strict=True) if not same
    ]
    if differing:
        more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
        raise ReplicasDifferError(f"{differing[0]}{more}: not the same bits on {among}")


def fingerprint(weight: torch.Tensor) -> torch.Tensor:
    """Two int64 sums over a tensor's bits, the second weighted by position (modulo 65,521), wrapping.

    Taken piece by piece: the bits as int64 are up to four times the weight.
    """
    bits = weight.detach().contiguous().view(-1).view(_AS_INTEGERS[weight.element_size()])
    sums = torch.zeros(2, dtype=torch.int64, device=bits.device)
    for start in range(0, bits.numel(), _PIECE):
        piece = bits[start : start + _PIECE].to(torch.int64)
        places = torch.arange(start, start + piece.numel(), device=bits.device) % 65_521 + 1
        sums[0] += piece.sum()
        sums[1] += piece.mul_(places).sum()
    return sums
