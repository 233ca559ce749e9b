"""What a rank sees of the processes beside it: its launcher, and the other ranks of its host.

A rank that is stopped or killed can't say so, and its launcher may be too far from the supervisor to ask.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from dstrain.runs.out_of_memory import OutOfMemory
from dstrain.runs.processes import Process, read_process


class LocalRanks:
    """Asked now and then. ``meet`` tells which numbers the other ranks of this host have."""

    def __init__(self) -> None:
        self._launcher = os.getppid()
        self._out_of_memory = OutOfMemory()
        self._ranks: dict[int, Process] = {}
        self._told: dict[int, str] = {}

    def meet(self, pids: Mapping[int, int]) -> None:
        """Numbers by rank, as those ranks said them. Only children of the same launcher are looked at: in a container
        of its own a rank counts its processes differently."""
        for rank, pid in pids.items():
            process = read_process(pid)
            if rank not in self._ranks and process is not None and process.parent == self._launcher:
                self._ranks[rank] = process

    def launcher_is_gone(self) -> bool:
        """Whether the process that started this rank has ended: by itself it outlives its ranks."""
        return os.getppid() != self._launcher

    def news(self) -> dict[str, Any]:
        """What has changed: ``stopped`` or ``goes_on`` (a list of ranks), ``killed`` (a signal by rank, if its launcher
        has not taken it yet) and ``out_of_memory`` (words of the kernel by rank)."""
        found: dict[str, Any] = {}
        for rank, known in list(self._ranks.items()):  # both threads of a rank come here
            now = read_process(known.pid)
            told = self._told.get(rank)
            if now is None or now.start != known.start or now.zombie:
                if told != "gone":
                    ended = now if now is not None and now.start == known.start else None
                    self._tell_of_death(rank, known.pid, ended, found)
                self._told[rank] = "gone"
            elif now.stopped and told != "stopped":
                found.setdefault("stopped", []).append(rank)
                self._told[rank] = "stopped"
            elif not now.stopped and told == "stopped":
                found.setdefault("goes_on", []).append(rank)
                self._told.pop(rank, None)
        return found

    def _tell_of_death(self, rank: int, pid: int, ended: Process | None, found: dict[str, Any]) -> None:
        words = self._out_of_memory.words(pid)
        if words is not None:
            found.setdefault("out_of_memory", {})[rank] = words
        if ended is not None and ended.exit_code & 0x7F:  # as waitpid(2) has it
            found.setdefault("killed", {})[rank] = ended.exit_code & 0x7F

    def kill_stopped(self) -> None:
        """SIGKILL of the ranks that are stopped: they would not end with their line, and their launcher would wait
        for them."""
        for known in self._ranks.values():
            now = read_process(known.pid)
            if now is not None and now.start == known.start and now.stopped:
                with suppress(OSError):  # ended in between, or not ours any more
                    os.kill(now.pid, signal.SIGKILL)
