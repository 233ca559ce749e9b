"""When a checkpoint is due: by steps, or by rank 0's clock."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import distributed

from dstrain.config.schema import RunConfig


class SaveSchedule:
    """Asked after each step, by all ranks together.

    The last step is always due, and so is every multiple of ``keep_every``: what is to be kept for good must
    be saved. With a length of time the clock restarts at each save. With ``never`` no step is due.
    """

    def __init__(
        self, config: RunConfig, device: torch.device, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """``device``: where the ranks' word to each other lies. ``clock``: seconds; rank 0's decides."""
        self._saves = config.saves
        self._last = config.steps
        self._keep_every = config.keep_every
        self._steps = config.save_every if isinstance(config.save_every, int) else 0
        self._seconds = config.save_every_seconds
        self._device = device
        self._clock = clock
        self._saved_at = clock()

    def due(self, step: int) -> bool:
        """Whether the state after ``step`` is saved. The same on all ranks; collective with a length of time."""
        if not self._saves:
            return False
        due = step == self._last or any(n > 0 and step % n == 0 for n in (self._steps, self._keep_every))
        return due or (self._seconds is not None and self._time_is_up())

    def saved(self) -> None:
        """Restart the clock: a save has ended."""
        self._saved_at = self._clock()

    def _time_is_up(self) -> bool:
        assert self._seconds is not None
        flag = torch.tensor([float(self._clock() - self._saved_at >= self._seconds)], device=self._device)
        distributed.broadcast(flag, src=0)
        return bool(flag.item())
