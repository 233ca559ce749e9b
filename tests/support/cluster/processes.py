"""The processes of a host, found by the namespace that they live in and never by name."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """``pid`` is its number on its host, ``outside`` the one that this machine knows it by."""

    pid: int
    outside: int
    parent_outside: int
    arguments: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.pid} {' '.join(self.arguments)}"


def pid_namespace(outside: int) -> str | None:
    """The name of the pid namespace of a process; None when it is gone or a zombie."""
    try:
        return os.readlink(f"/proc/{outside}/ns/pid")
    except OSError:
        return None


def in_namespace(name: str) -> list[Process]:
    """The living processes of a pid namespace, the oldest number first."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and pid_namespace(int(entry)) == name:
            with contextlib.suppress(OSError):  # ended meanwhile
                found.append(_read(int(entry)))
    return sorted(found, key=lambda process: process.pid)


def children(outside: int) -> list[int]:
    """The children of a process, by their numbers on this machine."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                if _parent(int(entry)) == outside:
                    found.append(int(entry))
    return found


def leads_session(outside: int) -> bool:
    """Whether a process is the first of its session; False when it is gone."""
    try:
        return int(_words(outside)[3]) == outside
    except OSError:
        return False


def send(outside: int, number: signal.Signals, *, parent: int | None = None, name: str | None = None) -> bool:
    """Signal a process, if it is still a child of ``parent``, or in the namespace ``name``.

    A pidfd is opened before that is looked at: the number can't go to a stranger in between.
    """
    try:
        handle = os.pidfd_open(outside)
    except ProcessLookupError:
        return False
    try:
        ours = _parent(outside) == parent if parent is not None else pid_namespace(outside) == name
        if ours:
            signal.pidfd_send_signal(handle, number)
        return ours
    except (FileNotFoundError, ProcessLookupError):
        return False
    finally:
        os.close(handle)


def end_all(namespace: str, keep: frozenset[int], seconds: float = 10) -> None:
    """SIGKILL all processes of a pid namespace but those numbered in ``keep`` (outside), until none is left.

    Raises:
        TimeoutError: something outlived it.
    """
    deadline = time.monotonic() + seconds
    while left := [process for process in in_namespace(namespace) if process.outside not in keep]:
        if time.monotonic() > deadline:
            raise TimeoutError("still running after SIGKILL: " + "; ".join(map(str, left)))
        for process in left:
            send(process.outside, signal.SIGKILL, name=namespace)
        time.sleep(0.02)


def _read(outside: int) -> Process:
    arguments = Path(f"/proc/{outside}/cmdline").read_bytes().rstrip(b"\0").split(b"\0")
    for line in Path(f"/proc/{outside}/status").read_text(errors="replace").splitlines():
        if line.startswith("NSpid:"):
            inside = int(line.split()[-1])
    return Process(inside, outside, _parent(outside), tuple(map(os.fsdecode, arguments)))


def _parent(outside: int) -> int:
    return int(_words(outside)[1])


def _words(outside: int) -> list[str]:
    """/proc/PID/stat from its third field on: state, parent, group, session, ..."""
    # The second field is the program's name in parentheses and may itself hold spaces and parentheses.
    return Path(f"/proc/{outside}/stat").read_text(errors="replace").rpartition(")")[2].split()
