"""How a run ended, and the one cause where it failed."""

from __future__ import annotations

import os
import re
import signal
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from dstrain.launch.guard import LEFT_BEHIND
from dstrain.launch.processes import in_words
from dstrain.launch.watch import RankWatch, Sign, killed_in_log, lost_in_log
from dstrain.plan.run_folder import RunFolder

_TAIL_LINES = 20
_TAIL_BYTES = 64 * 1024
_EXCEPTION = re.compile(r"(?:^|[\s:\]])(?:[\w.]+\.)?[A-Z]\w*(?:Error|Exception|Interrupt|Exit)\b")


@dataclass(frozen=True)
class Cause:
    """Why a run failed. ``rank`` and ``host`` are None where no single rank is known to be at fault."""

    rank: int | None
    host: str | None
    reason: str
    log_tail: list[str]


RESUMABLE = 75
"""The exit code of a run that left in order before its end: BSD's EX_TEMPFAIL, "try again later"."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    ``exit_code`` is 0 only when ``ok``; ``RESUMABLE`` when it left in order after step ``stopped_after``; 128 + N when
    the user's signal N ended it at once.
    """

    ok: bool
    exit_code: int
    cause: Cause | None
    stopped_after: int | None = None


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
    unfinished = watch.unfinished()
    if own_end and code == 0 and not unfinished and watch.stopped_after() is not None:
        return Outcome(False, RESUMABLE, None, watch.stopped_after())
    if own_end and code == 0 and not unfinished:
        return Outcome(ok=True, exit_code=0, cause=None)
    log = _lines(folder.launcher_log, log_start)
    sign = watch.first_failure()
    if sign is None and stops and not own_end:
        reason = f"stopped by {signal.Signals(stops[0]).name}"
        return Outcome(False, 128 + stops[0], Cause(None, None, reason, log[-_TAIL_LINES:]))
    exit_code = code if own_end and 0 < code < 256 else 1
    killed = killed_in_log(log)
    lost = lost_in_log(log)
    left_behind = _left_behind(log)
    rank: int | None = None
    host: str | None = None
    if left_behind is not None and sign is not None and _ended_by_guard(sign, left_behind[1]):
        reason = left_behind[0]
    elif lost is not None and killed is None and (sign is None or _follows_loss(sign, lost)):
        host = lost
        reason = f"the connection to {lost} was lost or could not be made; its ranks may still run there"
    elif sign is not None and (sign.killed or killed is None):
        rank, host, reason = sign.rank, sign.host, sign.reason
        if killed is not None and sign.killed and sign.signal is None:
            reason = f"killed by {in_words(killed[1])}"
    elif killed is not None:
        # A rank of another host was killed: it could say nothing, and the others failed for want of it.
        host, number = killed
        candidates = watch.still_running_on(host) if host else unfinished
        rank = candidates[0] if len(candidates) == 1 else None
        reason = ("a rank was " if rank is None else "") + f"killed by {in_words(number)}"
    elif not watch.spoke():
        reason = f"the launcher ended with exit code {code} before any rank spoke"
        telling = _telling_line(log)
        reason += f": {telling}" if telling else ""
    else:
        rank = unfinished[0] if unfinished else None
        status = watch.status(rank) if rank is not None else None
        host = status.host if status else None
        if unfinished:
            names = ", ".join(map(str, unfinished[:8])) + (", ..." if len(unfinished) > 8 else "")
            reason = f"the launcher ended with exit code {code}, and no word of done came from rank {names}"
        else:
            reason = f"all ranks are done, but the launcher ended with exit code {code}"
    tail = _lines(folder.rank_log(rank), 0)[-_TAIL_LINES:] if rank is not None else []
    return Outcome(False, exit_code, Cause(rank, host, reason, tail or log[-_TAIL_LINES:]))


def _left_behind(log: list[str]) -> tuple[str, float] | None:
    """What the guard wrote when the launcher ended before its ranks, and when that was."""
    for line in log:
        words, at, moment = line.rpartition(" at ")
        if at and words.startswith(LEFT_BEHIND):
            return words.removeprefix("dstrain: "), datetime.fromisoformat(moment).timestamp()
    return None


def _ended_by_guard(sign: Sign, launcher_ended: float) -> bool:
    """Whether a rank died of the guard's SIGTERM, or of its SIGKILL seconds later, and not by itself."""
    return sign.killed and (sign.follows or sign.signal is None or sign.time > launcher_ended + 1)


def _follows_loss(sign: Sign, lost: str) -> bool:
    """Whether a rank of another host failed, for want of the lost one, and was not killed."""
    return not sign.killed and sign.host.split(".")[0] != lost.split(".")[0]


def _telling_line(log: list[str]) -> str:
    """The last line that names an exception, or the last line."""
    spoken = [line.strip() for line in log if line.strip()]
    return next((line for line in reversed(spoken) if _EXCEPTION.search(line)), spoken[-1] if spoken else "")


def _lines(path: Path, start: int) -> list[str]:
    """The lines of a log from ``start`` on, at most its last 64 KiB."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(start, size - _TAIL_BYTES))
            return file.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return []  # no such log: a rank that never spoke
