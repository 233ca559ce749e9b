"""The launcher's log, how a run ended, and the single cause if it failed.

What a launcher's own lines mean stands with the launcher (`dstrain.launch.launchers`).
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from dstrain.errors import RESUMABLE
from dstrain.launch.launchers import find_killed_rank, find_lost_host
from dstrain.launch.launchers.output import KilledRank
from dstrain.runs.run_folder import RunFolder
from dstrain.supervise.process_tree import describe_signal, signal_name
from dstrain.supervise.rank_watch import RankWatch, Sign
from dstrain.supervise.subreaper import LEFT_BEHIND

_TAIL_LINES = 20


@dataclass(frozen=True)
class Cause:
    """Why a run failed. ``rank`` and ``host`` are None where no single rank is known to be at fault."""

    rank: int | None
    host: str | None
    reason: str
    log_tail: list[str]


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    ``exit_code`` is 0 only when ``ok``; ``RESUMABLE`` when it left in order after step ``stopped_after``; 128 + N when
    the user's signal N ended it at once. ``by_user``: it failed after it had been asked to stop. ``trained``: it came
    as far as to go on from a step, or to end one.
    """

    ok: bool
    exit_code: int
    cause: Cause | None
    stopped_after: int | None = None
    by_user: bool = False
    trained: bool = False


def judge(
    folder: RunFolder, watch: RankWatch, log_start: int, code: int, own_end: bool, stops: list[int]
) -> Outcome:
    """Find the cause once everything has ended.

    Args:
        log_start: where this launch's part of the launcher log begins, in bytes.
        code: the launcher's exit code.
        own_end: whether the launcher ended before it was told to.
        stops: the signals that the user sent, in their order.
    """
    log = log_lines(folder.launcher_log, log_start)
    left_behind = left_behind_in(log)
    # An ssh that was lost says nothing of ranks that went on to their end, each with its own connection.
    if own_end and not watch.unfinished() and (code == 0 or find_lost_host(log) is not None):
        if watch.stopped_after() is None:
            return Outcome(ok=True, exit_code=0, cause=None)
        # Where they left only after the launcher's end, the subreaper has told them to, and nobody else.
        if left_behind is None or watch.last_word_at() <= left_behind[1]:
            return Outcome(False, RESUMABLE, None, watch.stopped_after())
    sign = watch.first_failure()
    if sign is None and stops and not own_end:
        reason = f"stopped by {signal.Signals(stops[0]).name}"
        return Outcome(False, 128 + stops[0], Cause(None, None, reason, log[-_TAIL_LINES:]), by_user=True)
    exit_code = code if own_end and 0 < code < 256 else 1
    if left_behind is not None and (sign is None or _follows_the_launcher(sign, left_behind[1])):
        rank, host, reason = None, None, left_behind[0]
    else:
        rank, host, reason = _blame(watch, sign, log, code)
    tail = [] if rank is None else log_lines(folder.rank_log(rank), 0) or watch.tail(rank)
    return Outcome(
        False,
        exit_code,
        Cause(rank, host, reason, (tail or log)[-_TAIL_LINES:]),
        by_user=bool(stops),
        trained=watch.trained(),
    )


def _blame(
    watch: RankWatch, sign: Sign | None, log: list[str], code: int
) -> tuple[int | None, str | None, str]:
    """(rank, host, reason), where the launcher did not leave its ranks behind."""
    killed, lost = find_killed_rank(log), find_lost_host(log)
    if lost is not None and killed is None and (sign is None or _follows_loss(sign, lost)):
        return None, lost, f"the connection to {lost} was lost or could not be made"
    if sign is not None and (sign.killed or killed is None or not sign.follows):
        rank = None if sign.of_host else sign.rank
        return rank, sign.host, _how_it_ended(sign, killed, watch)
    if killed is not None:
        # A rank of another host was killed: it could say nothing, and the others failed for want of it.
        host = killed.host
        candidates = watch.still_running_on(host) if host else watch.unfinished()
        rank = candidates[0] if len(candidates) == 1 else None
        return (
            rank,
            host,
            ("a rank was " if rank is None else "") + f"killed by {describe_signal(killed.signal)}",
        )
    if not watch.spoke():
        telling = telling_line(log)
        reason = f"the launcher {_ended(code)} before any rank reported" + (f": {telling}" if telling else "")
        return None, None, reason
    unfinished = watch.unfinished()
    if not unfinished:
        return None, None, f"all ranks have finished, but the launcher {_ended(code)}"
    rank = unfinished[0] if len(unfinished) == 1 else None
    names = ", ".join(map(str, unfinished[:8])) + (", ..." if len(unfinished) > 8 else "")
    status = watch.status(rank) if rank is not None else None
    reason = f"the launcher {_ended(code)}, but rank {names} did not report that it had finished"
    return rank, status.host if status else None, reason


def _how_it_ended(sign: Sign, killed: KilledRank | None, watch: RankWatch) -> str:
    """What a rank said; or its signal, where its launcher saw it, and what the kernel says of that."""
    if not sign.killed or sign.of_host:
        return sign.reason
    number = sign.signal or watch.killed_by(sign.rank) or (killed.signal if killed else None)
    words = watch.out_of_memory(sign.rank) if number in (None, signal.SIGKILL) else None
    if words is not None:
        return f"killed by SIGKILL: {words}"
    return f"killed by {describe_signal(number)}" if number else sign.reason


def _ended(code: int) -> str:
    """``ended with exit code 1``, or ``was killed by SIGKILL`` for 137, as the subreaper reports it, and -9."""
    if code < 0:
        return f"was killed by {signal_name(-code)}"
    if code > 128 and code - 128 in signal.valid_signals():
        return f"was killed by {signal_name(code - 128)}"
    return f"ended with exit code {code}"


def _follows_the_launcher(sign: Sign, launcher_ended: float) -> bool:
    """Whether a rank ended because its launcher had: by the subreaper's SIGTERM, by its SIGKILL seconds later, or for
    want of what was cut off; and not by itself before."""
    if sign.quiet:
        return False  # a hang or a lost host: the launcher was ended for that
    if sign.follows or sign.of_host:
        return True
    if not sign.killed:
        return sign.time > launcher_ended
    return sign.signal is None or sign.time > launcher_ended + 1


def _follows_loss(sign: Sign, lost: str) -> bool:
    """Whether a rank of another host failed, for want of the lost one, and was not killed."""
    return not sign.killed and sign.host.split(".")[0] != lost.split(".")[0]


_TAIL_BYTES = 64 * 1024
_EXCEPTION = re.compile(r"(?:^|[\s:\]])(?:[\w.]+\.)?[A-Z]\w*(?:Error|Exception|Interrupt|Exit)\b")


def log_lines(path: Path, start: int) -> list[str]:
    """The lines of a log from ``start`` on, at most its last 64 KiB."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(start, size - _TAIL_BYTES))
            return file.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return []  # no such log: a rank that never spoke


def telling_line(log: Iterable[str]) -> str:
    """The last line that names an exception, or the last line."""
    spoken = [line.strip() for line in log if line.strip()]
    return next((line for line in reversed(spoken) if _EXCEPTION.search(line)), spoken[-1] if spoken else "")


def left_behind_in(log: Iterable[str]) -> tuple[str, float] | None:
    """What the subreaper wrote when the launcher ended before its ranks, and when that was."""
    for line in log:
        words, at, moment = line.rpartition(" at ")
        if at and words.startswith(LEFT_BEHIND):
            reason = words.removeprefix("dstrain: ")
            if "exit code 0," in reason:  # DeepSpeed's answer where what it waited for was killed
                reason += ": a process that it started was probably killed"
            return reason, datetime.fromisoformat(moment).timestamp()
    return None


class LauncherLogWatch:
    """Follows the launcher log from ``start`` (in bytes) for a host that was lost."""

    def __init__(self, path: Path, start: int) -> None:
        self._path = path
        self._position = start
        self._lost = False

    def lost_host(self) -> bool:
        """Whether a host has been lost by now. Reads only what is new, up to its last whole line."""
        if not self._lost:
            try:
                with self._path.open("rb") as file:
                    file.seek(self._position)
                    new = file.read()
            except OSError:
                return False  # a network file system's hiccup: the next look will tell
            whole = new[: new.rfind(b"\n") + 1]
            self._position += len(whole)
            self._lost = find_lost_host(whole.decode("utf-8", errors="replace").splitlines()) is not None
        return self._lost
