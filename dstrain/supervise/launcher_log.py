"""The launcher's log: the output of the launcher and of the subreaper.

What a launcher's own lines mean stands with the launcher (`dstrain.launch.launchers`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

from dstrain.launch.launchers import find_lost_host
from dstrain.supervise.subreaper import LEFT_BEHIND

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
