"""What ranks say to each other beside training: through a gloo group of all ranks, in host memory.

On GPUs the default group is NCCL's, which ends the process where a rank waits for longer than its timeout, 10 minutes.
A disk, a hook or a host that reads its data may take longer than that. Here a rank waits for a day: whether one is gone
or hangs is for the supervisor to find.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

TIMEOUT = timedelta(days=1)
"""Of what is said here."""

_made: tuple[Any, Any] | None = None
"""The default group, and the one that was made beside it."""


def control_group() -> Any:
    """The group of all ranks beside the default one. Collective where it is asked for first."""
    global _made
    world = distributed.group.WORLD
    if _made is None or _made[0] is not world:
        # A rehearsal's world has one process and no store: its backend serves here too.
        fake = distributed.get_backend() == "fake"
        _made = world, world if fake else distributed.new_group(backend="gloo", timeout=TIMEOUT)
    return _made[1]


def barrier() -> None:
    """Wait until all ranks are here. Collective."""
    distributed.barrier(group=control_group())


def all_reduce_max(numbers: Sequence[int]) -> list[int]:
    """The largest of all ranks' numbers at each place. Collective.

    Args:
        numbers: as many on every rank, each of 64 bits at most.
    """
    largest = torch.tensor(numbers, dtype=torch.int64)
    distributed.all_reduce(largest, op=distributed.ReduceOp.MAX, group=control_group())
    return [int(number) for number in largest.tolist()]
