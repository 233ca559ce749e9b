"""Tracks the status of all ranks and whether they are alive.

Asked are their connections, their status files and, on this host, their processes.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dstrain.runs.protocol import RankStatus
from dstrain.runs.run_folder import RunFolder
from dstrain.runs.this_machine import OutOfMemory, Process, arguments, read_process
from dstrain.supervise.control_server import RankConnection
from dstrain.supervise.process_tree import describe_signal

# Reading a thousand small files five times a second over NFS would load its server more than the training.
_SECONDS_A_RANK = 0.002
_GOOD_ENDS = ("done", "stopped")
_WORD_SECONDS = 1.0

# What a rank says that lost another: gloo's, NCCL's, torch.distributed's and the socket's words.
_LOST_ANOTHER = re.compile(
    r"connection (was )?(closed|reset|refused|aborted)|broken ?pipe|gloo|nccl|Dist(Backend|Network|Store)Error"
    r"|TCPStore|socket timeout|timed out waiting",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Sign:
    """That a rank failed.

    Args:
        time: seconds since the epoch.
        killed: it ended without a word; otherwise ``reason`` is its own.
        signal: what killed it, where that was seen.
        follows: another's end is probably its cause.
        of_host: it concerns the host, and the rank is one of those there.
        quiet: no process ends because of it, so there is nothing to wait for.
    """

    rank: int
    host: str
    reason: str
    time: float
    killed: bool
    signal: int | None = None
    follows: bool = False
    of_host: bool = False
    quiet: bool = False


class RankWatch:
    """Follows the ranks of one launch. ``session`` tells the session that the launcher's processes share, and
    ``connections`` what is known of each rank through its own.

    A rank counts as local when its status names this host (``socket.gethostname()``) and its pid was seen
    alive in that session, or with the run folder among its arguments (as when ssh started it). A host name
    alone proves nothing: containers can share one and still count their processes apart.
    """

    def __init__(
        self,
        folder: RunFolder,
        ranks: range,
        session: Callable[[], int],
        connections: Mapping[int, RankConnection],
    ) -> None:
        self._folder = folder
        self._connections = connections
        self._ranks = ranks
        self._session = session
        self._host = socket.gethostname()
        self._last: dict[int, RankStatus] = {}
        self._local: dict[int, Process] = {}
        self._alive_at: dict[int, float] = {}
        self._ended: dict[int, int] = {}  # rank -> wait status as far as it was seen, else -1
        self._signs: dict[int, Sign] = {}
        self._stopped_at: float | None = None
        self._out_of_memory = OutOfMemory()
        self._next_read = 0.0

    def update(self, *, force: bool = False) -> None:
        """Look at all ranks; at most as often as their number allows unless ``force``."""
        now = time.time()
        self._look_at_processes(now)
        if force or time.monotonic() >= self._next_read:
            for rank in self._ranks:
                self._read(rank)
            self._next_read = time.monotonic() + len(self._ranks) * _SECONDS_A_RANK
        for rank in self._connections.keys() - self._signs.keys():
            self._look_at_connection(rank)
        for rank in self._ended.keys() - self._signs.keys():
            connection = self._connections.get(rank)
            if (
                connection is not None
                and connection.lost_at is None
                and now - self._alive_at[rank] < _WORD_SECONDS
                and not force
            ):
                continue  # what it said last is still on its way
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

    def blame(self, sign: Sign) -> None:
        """A failure that another watcher found."""
        self._signs.setdefault(sign.rank, sign)

    def first_failure(self) -> Sign | None:
        """The earliest sign; a rank that was terminated, or lost its connection to another, comes after those that
        failed by themselves."""
        return min(self._signs.values(), key=lambda sign: (sign.follows, sign.time), default=None)

    def status(self, rank: int) -> RankStatus | None:
        return self._last.get(rank)

    def tail(self, rank: int) -> list[str]:
        """The end of its log as it was sent with its failure: the log may lie on a disk of its own."""
        connection = self._connections.get(rank)
        return [] if connection is None else connection.log_tail.splitlines()

    def out_of_memory(self, rank: int) -> str | None:
        """The kernel's own words, where it killed the rank for want of memory and where that may be read."""
        connection, local = self._connections.get(rank), self._local.get(rank)
        if connection is not None and connection.out_of_memory is not None:
            return connection.out_of_memory
        return self._out_of_memory.words(local.pid) if local is not None else None

    def killed_by(self, rank: int) -> int | None:
        """The signal that ended it, as a rank beside it has seen."""
        connection = self._connections.get(rank)
        return None if connection is None else connection.killed_by

    def unfinished(self) -> list[int]:
        """The ranks that said neither ``done`` nor ``stopped``."""
        return [r for r in self._ranks if r not in self._last or self._last[r].state not in _GOOD_ENDS]

    def stopped_after(self) -> int | None:
        """The step after which the ranks left in order; None if they did not."""
        return next((status.step for status in self._last.values() if status.state == "stopped"), None)

    def last_word_at(self) -> float:
        """When the last of the ranks' last words was said, in seconds since the epoch."""
        return max((status.time for status in self._last.values()), default=0.0)

    def has_missing_rank(self) -> bool:
        """Whether a rank is missing that is neither connected nor at its end."""
        connections = [self._connections.get(rank) for rank in self._ranks]
        return any(
            known is None or (known.lost_at is not None and known.status.state not in _GOOD_ENDS)
            for known in connections
        )

    def trained(self) -> bool:
        """Whether a rank has gone on from a step, or ended one."""
        return any(known.step for known in self._connections.values())

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

    def is_far(self, rank: int) -> bool:
        """Whether it is not among this host's processes that are known as ranks."""
        return rank not in self._local

    def local_processes(self) -> list[Process]:
        """The local ranks' processes as they were first seen; check ``start`` before signalling one."""
        return [process for rank, process in self._local.items() if rank not in self._ended]

    def _read(self, rank: int) -> None:
        try:
            status = self._folder.read_status(rank)
        except OSError:
            return  # a network file system's hiccup: the next look will tell
        connection = self._connections.get(rank)
        # What came over the connection has the time of this host's clock; a file has that of its own host.
        last = connection is not None and connection.status.state != "running"
        if connection is not None and (status is None or last or connection.status.time > status.time):
            status = connection.status
        if status is None or status == self._last.get(rank):
            return
        self._last[rank] = status
        if status.state == "failed" and self._before_the_stop(status.time):
            reason = status.error or "failed without giving a reason"
            follows = _LOST_ANOTHER.search(reason) is not None
            self._signs[rank] = Sign(rank, status.host, reason, status.time, killed=False, follows=follows)
        if rank not in self._local and status.host == self._host:
            self._add_local(rank, status.pid)

    def _look_at_connection(self, rank: int) -> None:
        """A rank of another host is dead when its connection has ended without its last word."""
        connection = self._connections[rank]
        host = connection.status.host
        if connection.orphaned_at is not None and self._before_the_stop(connection.orphaned_at):
            reason = f"the launcher on {host} ended before its ranks (killed?)"
            self._signs[rank] = Sign(rank, host, reason, connection.orphaned_at, killed=False, of_host=True)
            return
        if rank in self._local or connection.lost_at is None or not self._before_the_stop(connection.lost_at):
            return
        self._read(rank)
        if self._last.get(rank, connection.status).state != "running":
            return
        if connection.by_silence:
            reason = f"no contact with {host} any more: it lost power or network"
            self._signs[rank] = Sign(
                rank, host, reason, connection.lost_at, killed=True, of_host=True, quiet=True
            )
        else:
            reason = "ended without a message: crashed, or killed by a signal (SIGKILL if memory ran out)"
            self._signs[rank] = Sign(rank, host, reason, connection.lost_at, killed=True)

    def _before_the_stop(self, moment: float) -> bool:
        return self._stopped_at is None or moment < self._stopped_at

    def _add_local(self, rank: int, pid: int) -> None:
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
                self._note_stop(rank, process.stopped)

    def _note_stop(self, rank: int, stopped: bool) -> None:
        connection = self._connections.get(rank)
        if connection is not None:
            connection.stopped_at = (connection.stopped_at or time.monotonic()) if stopped else None

    def _vanished(self, rank: int) -> Sign:
        status = self._ended[rank]
        signal_number = status & 0x7F if status >= 0 else 0
        if signal_number:
            reason = f"killed by {describe_signal(signal_number)}"
        elif status > 0:
            reason = f"ended with exit code {os.waitstatus_to_exitcode(status)} without a message"
        else:
            # Its launcher took the exit code before we looked. A rank says why it fails, if it still can.
            reason = "ended without a message: crashed, or killed by a signal (SIGKILL if memory ran out)"
        return Sign(
            rank,
            self._last[rank].host,
            reason,
            self._alive_at[rank],
            killed=True,
            signal=signal_number or None,
            follows=signal_number == signal.SIGTERM,
        )
