"""What a rank observes of the other processes on its host: its launcher and the other ranks.

A rank that is stopped or killed can't say so, and its launcher may be too far from the supervisor to ask.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import suppress

from dstrain.runs.protocol import (
    LocalChange,
    LocalRank,
    RankKilled,
    RankOutOfMemory,
    RankResumed,
    RankStopped,
)
from dstrain.runs.this_machine import OutOfMemory, Process, read_process

_SIGNALS = range(1, signal.NSIG)


class LocalRankMonitor:
    """Asked now and then. ``add`` names the other ranks of this host."""

    def __init__(self) -> None:
        self._launcher = os.getppid()
        self._out_of_memory = OutOfMemory()
        self._ranks: dict[int, Process] = {}
        self._reported: dict[int, str] = {}

    def add(self, local: LocalRank) -> None:
        """Only a child of the same launcher is looked at: in a container of its own a rank counts its processes
        differently."""
        process = read_process(local.pid)
        if local.rank not in self._ranks and process is not None and process.parent == self._launcher:
            self._ranks[local.rank] = process

    def launcher_is_gone(self) -> bool:
        """Whether the process that started this rank has ended: by itself it outlives its ranks."""
        return os.getppid() != self._launcher

    def changes(self) -> list[LocalChange]:
        """What has changed since it was asked last."""
        found: list[LocalChange] = []
        for rank, known in list(self._ranks.items()):  # both threads of a rank come here
            now = read_process(known.pid)
            reported = self._reported.get(rank)
            if now is None or now.start != known.start or now.zombie:
                if reported != "gone":
                    ended = now if now is not None and now.start == known.start else None
                    found += self._death(rank, known.pid, ended)
                self._reported[rank] = "gone"
            elif now.stopped and reported != "stopped":
                found.append(RankStopped(rank))
                self._reported[rank] = "stopped"
            elif not now.stopped and reported == "stopped":
                found.append(RankResumed(rank))
                self._reported.pop(rank, None)
        return found

    def _death(self, rank: int, pid: int, ended: Process | None) -> Iterator[LocalChange]:
        """Why it ended; ``ended`` has its exit code, if its launcher has not taken it yet."""
        words = self._out_of_memory.words(pid)
        if words is not None:
            yield RankOutOfMemory(rank, words)
        if ended is not None and ended.exit_code & 0x7F in _SIGNALS:  # as waitpid(2) has it
            yield RankKilled(rank, ended.exit_code & 0x7F)

    def kill_stopped(self) -> None:
        """SIGKILL of the ranks that are stopped: they would not end with their connection, and their launcher would
        wait for them."""
        for known in self._ranks.values():
            now = read_process(known.pid)
            if now is not None and now.start == known.start and now.stopped:
                with suppress(OSError):  # ended in between, or not ours any more
                    os.kill(now.pid, signal.SIGKILL)
