"""Detects processes that the kernel killed for lack of memory."""

from __future__ import annotations

import os
import re
import time
import weakref
from pathlib import Path

# Priority, number and microseconds since boot come before a record's text.
_KILLED = re.compile(
    r"^\d+,\d+,(?P<at>\d+)[^;]*;(?P<line>.*\bKilled process (?P<pid>\d+) \((?P<name>[^)]*)\).*)$"
)
_RECENT_SECONDS = 30.0
_FIRST_PID_NAMESPACE = "pid:[4026531836]"  # PROC_PID_INIT_INO of the kernel


class OutOfMemory:
    """Made while the process lives, asked once it is dead.

    The kernel's log tells which process was killed (/dev/kmsg; readable for root, and for all where
    kernel.dmesg_restrict is 0); the control group of this process counts the kills in it. Where neither may be
    read there is nothing to say.
    """

    def __init__(self, log: str = "/dev/kmsg") -> None:
        self._kmsg: int | None = None
        try:
            self._kmsg = os.open(log, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            weakref.finalize(self, os.close, self._kmsg)
            os.lseek(self._kmsg, 0, os.SEEK_END)  # what is written from now on
        except OSError:
            pass  # no right to, or another kernel
        self._name = _text("/proc/self/comm").strip()
        self._counted = _kills_in_own_group()
        self._found: list[re.Match[str]] = []

    def words(self, pid: int) -> str | None:
        """What the kernel says of the death of ``pid``, a process with the same program as this one; or None."""
        self._read()
        for match in self._found:
            if int(match["pid"]) == pid or self._may_be(match):
                return f"the kernel says: {match['line'].strip()}"
        now = _kills_in_own_group()
        if now is not None and self._counted is not None and now > self._counted:
            return "its control group counts an out-of-memory kill"
        return None

    def _may_be(self, match: re.Match[str]) -> bool:
        """In a container the log has numbers of another namespace, and tells of other containers too."""
        recent = abs(time.monotonic() - int(match["at"]) / 1e6) < _RECENT_SECONDS
        return recent and match["name"] == self._name and not _in_first_namespace()

    def _read(self) -> None:
        while self._kmsg is not None:
            try:
                record = os.read(self._kmsg, 8192).decode(errors="replace")
            except BrokenPipeError:
                continue  # some were overwritten before we came: the next is the oldest that is left
            except OSError:
                return  # no more for now
            if not record:
                return
            match = _KILLED.match(record.split("\n", 1)[0])
            if match:
                self._found.append(match)


def _in_first_namespace() -> bool:
    try:
        return os.readlink("/proc/self/ns/pid") == _FIRST_PID_NAMESPACE
    except OSError:
        return True


def _kills_in_own_group() -> int | None:
    """``oom_kill`` of this process's control group: memory.events of version 2, memory.oom_control of version 1."""
    for line in _text("/proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            counters = _text(f"/sys/fs/cgroup{path}/memory.events")
        elif controllers == "memory":
            counters = _text(f"/sys/fs/cgroup/memory{path}/memory.oom_control")
        else:
            continue
        for counter in counters.splitlines():
            if counter.startswith("oom_kill "):
                return int(counter.split()[1])
    return None


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
