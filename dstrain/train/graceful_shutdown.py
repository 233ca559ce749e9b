"""Graceful shutdown: finishes the current step, saves and exits, on a signal or at the time limit."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from types import FrameType

from torch import distributed

from dstrain.control_group import all_reduce_max
from dstrain.stop_signals import WARNINGS, heeded

SIGNALS = (signal.SIGTERM, signal.SIGINT, *WARNINGS)


class GracefulShutdown:
    """Asked after each step whether to leave. A second signal ends the process at once.

    Args:
        asked: whether somebody asks this rank for it: its supervisor's word, which needs no signal to reach this host.
        limit: seconds from now on after which to leave; None for no limit.
    """

    def __init__(self, asked: Callable[[], bool], limit: float | None) -> None:
        self._asked = asked
        self._deadline = None if limit is None else time.monotonic() + limit
        self._rank = distributed.get_rank()
        self._signalled = False
        # With Slurm ranks begin with SIGTERM ignored (`dstrain.launch.launchers.slurm`): now they can save.
        self._heeded = [signal.SIGTERM, *(number for number in heeded(SIGNALS) if number != signal.SIGTERM)]
        for number in self._heeded:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True
        for each in self._heeded:
            signal.signal(each, signal.SIG_DFL)

    def agreed(self) -> bool:
        """Whether any rank has a reason to leave. Collective: all ranks leave after the same step."""
        [wanted] = all_reduce_max([self.wanted()])
        return bool(wanted)

    def wanted(self) -> bool:
        """Whether this rank has a reason to leave."""
        if self._signalled or self._asked():
            return True
        # One clock is enough.
        return self._rank == 0 and self._deadline is not None and time.monotonic() >= self._deadline
