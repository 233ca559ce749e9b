"""Finds the processes of a run, never by name."""

from __future__ import annotations

import os
import signal

from dstrain.runs.this_machine import Process, read_process


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


def signal_name(number: int) -> str:
    """``SIGKILL`` for 9; ``signal 42`` for one without a name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def describe_signal(number: int) -> str:
    """``SIGKILL (probably out of memory)`` for 9."""
    name = signal_name(number)
    hints = {
        "SIGKILL": " (probably out of memory)",
        "SIGSEGV": " (a crash in native code)",
        "SIGBUS": " (probably /dev/shm or the disk is full)",
        "SIGABRT": " (native code aborted; see the log)",
        "SIGILL": " (native code built for another processor)",
    }
    return name + hints.get(name, "")
