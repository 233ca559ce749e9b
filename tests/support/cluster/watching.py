"""What everybody on a machine can see while commands run on a cluster: command lines, listeners, readable files."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from tests.support.cluster.hosts import Cluster
from tests.support.cluster.processes import in_namespace

_LISTENS = "0A"
_SECONDS_BETWEEN_LOOKS = 0.05
_MOST_BYTES = 50 * 10**6


@dataclass(frozen=True)
class Listener:
    """A TCP socket that listens. ``program`` is the command line of a process that holds it, if one was found."""

    host: str
    address: str
    port: int
    program: str

    @property
    def off_loopback(self) -> bool:
        return not self.address.startswith("127.") and self.address != "::1"


class Watch:
    """Looks all the time from ``with`` on, until its end. What listened before does not count.

    Attributes:
        command_lines: of every process that was seen, on any host and on this machine.
        listeners: of all hosts, by the kernel's number of the socket. One that closed before its process was found is
            not among them: it listened for less than two looks.
    """

    def __init__(self, cluster: Cluster) -> None:
        self.command_lines: set[bytes] = set()
        self.listeners: dict[int, Listener] = {}
        self._cluster = cluster
        self._first = {name: cluster.first_process(name) for name in cluster.names if cluster.up(name)}
        self._before = {number for name in self._first for number, _, _ in self._listening(name)}
        self._without_holder: set[int] = set()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look_on)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def seen(self, secret: str) -> list[bytes]:
        """The command lines that hold it."""
        return [line for line in self.command_lines if secret.encode() in line]

    def off_loopback(self) -> list[Listener]:
        return [listener for listener in self.listeners.values() if listener.off_loopback]

    def _look_on(self) -> None:
        while not self._ended.wait(_SECONDS_BETWEEN_LOOKS):
            for entry in os.listdir("/proc"):
                if entry.isdigit():
                    with contextlib.suppress(OSError):
                        self.command_lines.add(Path(f"/proc/{entry}/cmdline").read_bytes())
            for name in self._first:
                for number, address, port in self._listening(name):
                    if number not in self._before and number not in self.listeners:
                        self._found(number, name, address, port)

    def _found(self, number: int, name: str, address: str, port: int) -> None:
        """A socket may close between its line in the table and the look at its process: one may, not the same twice."""
        holder = self._holder(name, number)
        if holder or number in self._without_holder:
            self.listeners[number] = Listener(name, address, port, holder)
        self._without_holder.add(number)

    def _listening(self, name: str) -> list[tuple[int, str, int]]:
        """Number, address and port of each (proc_pid_net(5))."""
        found = []
        for table in ("tcp", "tcp6"):
            with contextlib.suppress(OSError):  # the host is gone
                for line in Path(f"/proc/{self._first[name]}/net/{table}").read_text().splitlines()[1:]:
                    words = line.split()
                    if words[3] == _LISTENS:
                        address, _, port = words[1].partition(":")
                        found.append((int(words[9]), _address(address), int(port, 16)))
        return found

    def _holder(self, name: str, number: int) -> str:
        for process in in_namespace(self._cluster.namespace(name)):
            with contextlib.suppress(OSError):
                for link in os.scandir(f"/proc/{process.outside}/fd"):
                    if os.readlink(link.path) == f"socket:[{number}]":
                        return " ".join(process.arguments)
        return ""


def readable_with(secrets: Sequence[str], places: Iterable[Path], *, since: float) -> list[Path]:
    """The files below ``places`` that the group or others may read, and that hold a secret. Folders are not asked for
    their modes; those of tests that run elsewhere are passed over. ``since``: by `time.time`; nor is what was changed
    earlier looked at."""
    wanted = [secret.encode() for secret in secrets]
    found = []
    for place in places:
        for folder, folders, names in os.walk(place):
            folders[:] = [name for name in folders if not name.startswith("pytest-of-")]
            for path in (Path(folder, name) for name in names):
                with contextlib.suppress(OSError):
                    status = path.lstat()
                    may = stat.S_ISREG(status.st_mode) and status.st_mode & 0o044
                    if may and status.st_mtime >= since and status.st_size < _MOST_BYTES:
                        content = path.read_bytes()
                        found += [path] if any(secret in content for secret in wanted) else []
    return found


def _address(text: str) -> str:
    """The kernel writes words of 32 bits in this machine's order."""
    raw = bytes.fromhex(text)
    words = b"".join(raw[start : start + 4][::-1] for start in range(0, len(raw), 4))
    return socket.inet_ntop(socket.AF_INET if len(words) == 4 else socket.AF_INET6, words)
