"""Detects hangs: a step that takes far longer than those before, or a stopped rank."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping

from dstrain.files import write_atomically
from dstrain.runs.protocol import WAITING_FOR_DATA, WAITS_FOR, DumpStacks
from dstrain.runs.run_folder import RunFolder
from dstrain.supervise.control_server import ControlServer, RankConnection
from dstrain.supervise.rank_watch import Sign

LEAST_SECONDS = 60.0
"""No step is called hung before, once one is known to compare it with."""
BUSY_SECONDS = 1800.0
"""Nor what nobody knows the length of: the second step, and a validation loss or a checkpoint between two steps."""
TIMES_THE_SLOWEST = 10.0
STOPPED_SECONDS = 10.0
"""A rank that a signal (SIGSTOP, or Ctrl-Z) has stopped for so long holds up all others."""

_ANSWER_SECONDS = 5.0
_AWAY_SECONDS = 2.0  # without a look: we were stopped ourselves, and maybe all of the run with us
_TOLD = 4  # of ranks that wait; the files hold all

_THREAD = re.compile(r"^(?:Thread|Current thread) .*$", re.MULTILINE)
_FRAME = re.compile(r'^  File "(?P<file>[^"]*)", line (?P<line>\d+) in (?P<name>.*)$', re.MULTILINE)
_WAITS_FOR = re.compile(rf"^{WAITS_FOR}(?P<what>.+)$", re.MULTILINE)


class Progress:
    """Fed with what is known of the ranks at each poll.

    Args:
        bound: seconds without a step, or with one thing between two, after which the run hangs; None to derive it
            from the steps before, infinity for never.
    """

    def __init__(self, bound: float | None) -> None:
        self._bound = bound
        self._step = 0
        self._step_at = 0.0
        self._slowest = 0.0
        self._busy = False

    def seconds_without_step(self, ranks: Mapping[int, RankConnection], now: float) -> float | None:
        """How long no rank has ended a step, once that is too long; else None.

        Nothing hangs before the first step (a model is loaded), unless it waits for its data, and once a rank has
        reached the end.
        """
        if any(rank.status.state != "running" for rank in ranks.values()):
            return None
        newest = max(ranks.values(), key=lambda rank: (rank.step, rank.step_at), default=None)
        if newest is None:
            return None
        if newest.step == 0:
            since = [rank.step_at for rank in ranks.values() if rank.busy == WAITING_FOR_DATA]
            return now - min(since) if since and now - min(since) > self.bound else None
        if newest.step > self._step:
            if self._step:
                self._slowest = max(self._slowest, newest.step_at - self._step_at)
            self._step = newest.step
        self._step_at = max(self._step_at, newest.step_at)
        self._busy = any(rank.busy for rank in ranks.values())
        waited = now - self._step_at
        return waited if waited > self.bound else None

    @property
    def bound(self) -> float:
        if self._bound is not None:
            return self._bound
        unknown = self._busy or not self._slowest
        return max(BUSY_SECONDS if unknown else LEAST_SECONDS, TIMES_THE_SLOWEST * self._slowest)


class HangWatch:
    """Names the ranks that hold a run up, and writes down where every rank stands.

    Args:
        folder: gets ``logs/rank-N.stacks.txt`` of each rank that answers.
    """

    def __init__(self, control: ControlServer, progress: Progress, folder: RunFolder) -> None:
        self._control = control
        self._progress = progress
        self._folder = folder
        self._asked_at: float | None = None
        self._looked_at = time.monotonic()
        self.silent: list[int] = []
        """The ranks that did not answer, once there is a hang."""

    def look(self) -> Sign | None:
        """To be called at each poll: the hang, once it is one and all ranks had time to answer."""
        ranks, now = self._control.ranks, time.monotonic()
        stopped = self._stopped_seconds(now)
        waited = self._progress.seconds_without_step(ranks, now)
        if waited is None and stopped is None:
            self._asked_at = None
            return None
        if self._asked_at is None:
            self._asked_at = now
            for rank in ranks.values():
                rank.stacks = None  # of an earlier question
            self._control.broadcast(DumpStacks())
            return None
        awaited = [rank for rank in ranks.values() if rank.stacks is None and rank.stopped_at is None]
        if awaited and now - self._asked_at < _ANSWER_SECONDS:
            return None
        if waited is not None:
            return self._sign(f"no step for {waited:.0f} s (hang_after: {self._progress.bound:.0f} s)")
        return self._sign(f"no progress possible for {stopped:.0f} s")

    def _stopped_seconds(self, now: float) -> float | None:
        """How long a rank has been stopped, once that is too long; else None."""
        away, self._looked_at = now - self._looked_at > _AWAY_SECONDS, now
        longest = 0.0
        for rank in self._control.ranks.values():
            if rank.stopped_at is not None and rank.lost_at is None:
                rank.stopped_at = now if away else rank.stopped_at
                longest = max(longest, now - rank.stopped_at)
        bound = self._progress.bound  # infinity: nothing is called a hang
        return longest if longest > min(STOPPED_SECONDS, bound) and bound < float("inf") else None

    def _sign(self, what: str) -> Sign:
        ranks = self._control.ranks
        for number, rank in ranks.items():
            if rank.stacks is not None:
                write_atomically(self._folder.rank_stacks(number), rank.stacks, below=self._folder.path)
        self.silent = silent = [number for number, rank in sorted(ranks.items()) if rank.stacks is None]
        first = silent[0] if silent else min(ranks)
        if silent:
            who = ", ".join(f"rank {number} on {ranks[number].status.host}" for number in silent[:8])
            known = all(ranks[number].stopped_at is not None for number in silent)
            why = "stopped (SIGSTOP)" if known else "stopped (SIGSTOP), stuck in native code, or cut off"
            what += f"; {who} {'does' if len(silent) == 1 else 'do'} not answer: {why}"
        stand = [
            f"rank {number} waits{_for_what(rank.stacks)} in {where_it_stands(rank.stacks)}"
            for number, rank in sorted(ranks.items())
            if rank.stacks is not None
        ]
        reason = "; ".join([what, *stand[:_TOLD]])
        return Sign(first, ranks[first].status.host, reason, time.time(), killed=False, quiet=True)


def _for_what(stacks: str) -> str:
    said = _WAITS_FOR.search(stacks)
    return f" for {said['what']}" if said else ""


def where_it_stands(stacks: str) -> str:
    """The main thread's innermost frames in one line, innermost first, from `faulthandler.dump_traceback`."""
    threads = _THREAD.split(stacks)  # the main thread's comes last
    frames = [
        f"{match['name']} ({match['file'].rpartition('/')[2]}:{match['line']})"
        for match in _FRAME.finditer(threads[-1])
    ]
    return " < ".join(frames[:3]) or "no Python code"
