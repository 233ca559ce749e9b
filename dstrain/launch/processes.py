"""Which processes are ours, read from /proc. Nothing here finds a process by its name."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """One line of /proc/<pid>/stat. ``start`` (clock ticks since boot) tells a process from a later one that
    was given the same number."""

    pid: int
    parent: int
    session: int
    start: int
    zombie: bool
    exit_code: int


def read_process(pid: int) -> Process | None:
    """The process with this number, or None."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The second field is the program's name in parentheses and may itself hold spaces and parentheses.
    words = text[text.rfind(")") + 2 :].split()
    exit_code = int(words[49]) if len(words) > 49 else 0
    return Process(pid, int(words[1]), int(words[3]), int(words[19]), words[0] in "ZX", exit_code)


def arguments(pid: int) -> list[str]:
    """The argv of a process; empty when it is gone or a zombie."""
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return []
    return [os.fsdecode(word) for word in raw.split(b"\0")]


def family(root: int) -> list[Process]:
    """The living processes of the session that ``root`` leads and all of their descendants, without ``root``.

    A number stays taken while it names a session, so no stranger can be in the list.
    """
    processes = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            process = read_process(int(name))
            if process is not None:
                processes.append(process)
    found = {root} | {process.pid for process in processes if process.session == root}
    grown = True
    while grown:
        more = {process.pid for process in processes if process.parent in found} - found
        found |= more
        grown = bool(more)
    return [p for p in processes if p.pid in found and p.pid != root and not p.zombie]


def kill(process: Process, number: signal.Signals) -> None:
    """Send a signal, unless the process is gone or its number belongs to another one by now."""
    now = read_process(process.pid)
    if now is None or now.start != process.start:
        return
    try:
        os.kill(process.pid, number)
    except (ProcessLookupError, PermissionError):
        return  # ended in between, or changed its user: not ours any more


def in_words(number: int) -> str:
    """``SIGKILL (probably out of memory)`` for 9."""
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    hints = {
        "SIGKILL": " (probably out of memory)",
        "SIGSEGV": " (a crash in native code)",
        "SIGBUS": " (probably /dev/shm or the disk is full)",
        "SIGABRT": " (native code gave up; see the log)",
        "SIGILL": " (native code built for another processor)",
    }
    return name + hints.get(name, "")
