"""What the ranks say and whether they live: from their status files and, on this host, their processes."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dstrain.launch.processes import Process, arguments, in_words, read_process
from dstrain.plan.run_folder import RankStatus, RunFolder

# Reading a thousand small files five times a second over NFS would load its server more than the training.
_SECONDS_A_RANK = 0.002
_SIGTERM = 15


@dataclass(frozen=True)
class Sign:
    """That a rank failed.

    Args:
        time: seconds since the epoch.
        killed: it ended without a word; otherwise ``reason`` is its own.
        signal: what killed it, where that was seen.
        follows: another's end is probably its cause.
    """

    rank: int
    host: str
    reason: str
    time: float
    killed: bool
    signal: int | None = None
    follows: bool = False


class RankWatch:
    """Follows the ranks of one launch. ``session`` tells the session that the launcher's processes share.

    A rank counts as local when its status names this host (``socket.gethostname()``) and its pid was seen
    alive in that session, or with the run folder among its arguments (as when ssh started it). A host name
    alone proves nothing: containers can share one and still count their processes apart.
    """

    def __init__(self, folder: RunFolder, world_size: int, session: Callable[[], int]) -> None:
        self._folder = folder
        self._world_size = world_size
        self._session = session
        self._host = socket.gethostname()
        self._last: dict[int, RankStatus] = {}
        self._local: dict[int, Process] = {}
        self._alive_at: dict[int, float] = {}
        self._ended: dict[int, int] = {}  # rank -> wait status as far as it was seen, else -1
        self._signs: dict[int, Sign] = {}
        self._stopped_at: float | None = None
        self._next_read = 0.0

    def update(self, *, force: bool = False) -> None:
        """Look at all ranks; at most as often as their number allows unless ``force``."""
        now = time.time()
        self._look_at_processes(now)
        if force or time.monotonic() >= self._next_read:
            for rank in range(self._world_size):
                self._read(rank)
            self._next_read = time.monotonic() + self._world_size * _SECONDS_A_RANK
        for rank in self._ended.keys() - self._signs.keys():
            # A rank speaks before it ends, so its last word may be newer than the one that was read above.
            self._read(rank)
            if self._last[rank].state == "running":
                self._signs[rank] = self._vanished(rank)

    def look(self) -> None:
        """Look at the local processes alone: cheap, and a dead one shows its exit code only for a moment."""
        self._look_at_processes(time.time())

    def stop(self) -> None:
        """From now on ranks end because they are told to: no sign of failure any more."""
        if self._stopped_at is None:
            self._stopped_at = time.time()

    def first_failure(self) -> Sign | None:
        """The earliest sign; a rank that was terminated comes after those that failed by themselves."""
        return min(self._signs.values(), key=lambda sign: (sign.follows, sign.time), default=None)

    def status(self, rank: int) -> RankStatus | None:
        return self._last.get(rank)

    def unfinished(self) -> list[int]:
        """The ranks that said neither ``done`` nor ``stopped``."""
        ends = ("done", "stopped")
        return [r for r in range(self._world_size) if r not in self._last or self._last[r].state not in ends]

    def stopped_after(self) -> int | None:
        """The step after which the ranks left in order; None if they did not."""
        return next((status.step for status in self._last.values() if status.state == "stopped"), None)

    def spoke(self) -> bool:
        """Whether any rank said anything."""
        return bool(self._last)

    def still_running_on(self, host: str) -> list[int]:
        """The ranks of ``host`` (compared without domain) whose last word is ``running``."""
        return [
            rank
            for rank, status in sorted(self._last.items())
            if status.state == "running" and status.host.split(".")[0] == host.split(".")[0]
        ]

    def local_processes(self) -> list[Process]:
        """The local ranks' processes as they were first seen; check ``start`` before signalling one."""
        return [process for rank, process in self._local.items() if rank not in self._ended]

    def _read(self, rank: int) -> None:
        try:
            status = self._folder.read_status(rank)
        except OSError:
            return  # a network file system's hiccup: the next look will tell
        if status is None or status == self._last.get(rank):
            return
        self._last[rank] = status
        if status.state == "failed" and (self._stopped_at is None or status.time < self._stopped_at):
            reason = status.error or "failed without giving a reason"
            self._signs[rank] = Sign(rank, status.host, reason, status.time, killed=False)
        if rank not in self._local and status.host == self._host:
            self._meet(rank, status.pid)

    def _meet(self, rank: int, pid: int) -> None:
        process = read_process(pid)
        if process is None:
            return
        if process.session == self._session() or str(self._folder.path) in arguments(pid):
            self._local[rank] = process
            self._alive_at[rank] = time.time()

    def _look_at_processes(self, now: float) -> None:
        if self._stopped_at is not None:
            return
        for rank, known in self._local.items():
            if rank in self._ended:
                continue
            process = read_process(known.pid)
            if process is None or process.start != known.start:
                self._ended[rank] = -1
            elif process.zombie:
                self._ended[rank] = process.exit_code
            else:
                self._alive_at[rank] = now

    def _vanished(self, rank: int) -> Sign:
        status = self._ended[rank]
        signal_number = status & 0x7F if status >= 0 else 0
        if signal_number:
            reason = f"killed by {in_words(signal_number)}"
        elif status > 0:
            reason = f"ended with exit code {os.waitstatus_to_exitcode(status)} without a word"
        else:
            # Its launcher took the exit code before we looked. A rank says why it fails, if it still can.
            reason = "ended without a word: crashed, or killed by a signal (SIGKILL where memory ran out)"
        return Sign(
            rank,
            self._last[rank].host,
            reason,
            self._alive_at[rank],
            killed=True,
            signal=signal_number or None,
            follows=signal_number == _SIGTERM,
        )


# pdsh puts "host: " before each line of a remote launcher.
_RETURN_CODE = re.compile(r"^(?:(?P<host>[A-Za-z0-9._-]+): )?.*exits with return code = (?P<code>-?\d+)")


def killed_in_log(lines: list[str]) -> tuple[str | None, int] | None:
    """(host or None, signal) of the first rank that DeepSpeed's launcher reports as killed, but for SIGTERM,
    which it sends itself."""
    for line in lines:
        match = _RETURN_CODE.search(line)
        if match and int(match["code"]) < 0 and int(match["code"]) != -_SIGTERM:
            return match["host"], -int(match["code"])
    return None


# ssh's own code for a connection that was lost or never made; pdsh waits for the other hosts all the same.
_LOST = re.compile(r"^pdsh@[^:\s]+: (?P<host>\S+): ssh exited with exit code 255\s*$")


def lost_in_log(lines: list[str]) -> str | None:
    """The first host that pdsh's ssh could not reach, or not any more."""
    return next((match["host"] for match in map(_LOST.search, lines) if match), None)


class LogWatch:
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
            self._lost = lost_in_log(whole.decode("utf-8", errors="replace").splitlines()) is not None
        return self._lost
