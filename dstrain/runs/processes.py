"""Reads process information from /proc."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """One line of /proc/<pid>/stat (proc_pid_stat(5)). ``start`` (clock ticks since boot) tells a process from a
    later one that was given the same number; ``stopped``: by SIGSTOP or its kin, not by a debugger."""

    pid: int
    parent: int
    session: int
    start: int
    zombie: bool
    stopped: bool
    exit_code: int


def read_process(pid: int) -> Process | None:
    """The process with this number, or None."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The second field is the program's name in parentheses and may itself hold spaces and parentheses.
    words = text[text.rfind(")") + 2 :].split()
    state, parent, session, start = words[0], int(words[1]), int(words[3]), int(words[19])
    exit_code = int(words[49]) if len(words) > 49 else 0
    return Process(pid, parent, session, start, state in "ZX", state == "T", exit_code)


def arguments(pid: int) -> list[str]:
    """The argv of a process; empty when it is gone or a zombie."""
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return []
    return [os.fsdecode(word) for word in raw.split(b"\0")]
