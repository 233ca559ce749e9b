"""What the kernel says of this machine: its processes, those killed for lack of memory, and its addresses."""

from __future__ import annotations

import errno
import ipaddress
import os
import re
import socket
import time
import weakref
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


# Any does.
_PORT = 9
OUTSIDE = "192.0.2.1"
"""Reserved for documentation (RFC 5737): the way there is the way to the outside."""
OUTSIDE_6 = "2001:db8::1"
"""The same of IPv6 (RFC 3849)."""
LOOPBACK, LOOPBACK_6 = "127.0.0.1", "::1"


def address_towards(family: int, place: str) -> str | None:
    """The own address by which a packet to the address ``place`` would leave; None where no way leads there."""
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((place, _PORT))
            return str(probe.getsockname()[0])
    except OSError:
        return None


def own_addresses() -> list[str]:
    """The addresses at which others find this machine: of IPv4 before IPv6, of each that of the way to the outside
    first; loopback at the end. Without those of IPv6 that need a zone: it would mean nothing on another host."""
    import psutil  # here: a plan asks for no more than `address_towards`

    held = [entry for card in psutil.net_if_addrs().values() for entry in card]
    outside: list[str] = []
    for family, place in ((socket.AF_INET, OUTSIDE), (socket.AF_INET6, OUTSIDE_6)):
        outward = address_towards(family, place)
        found = [] if outward is None else [outward]
        found += [entry.address for entry in held if entry.family == family]
        outside += [address for address in dict.fromkeys(found) if not _is_local(address)]
    return [*outside, LOOPBACK if any(entry.address == LOOPBACK for entry in held) else LOOPBACK_6]


def _is_local(address: str) -> bool:
    """Whether it says nothing to another host."""
    found = ipaddress.ip_address(address)
    return found.is_loopback or (found.version == 6 and found.is_link_local)


def listening_socket(port: int = 0, *, only_here: bool = False, backlog: int = 1024) -> socket.socket:
    """A TCP socket that listens at ``port`` (0: a free one): on loopback alone, or on all addresses of this machine.

    Raises:
        OSError: there is none to be had.
    """
    if only_here:
        try:
            return socket.create_server((LOOPBACK, port), backlog=backlog)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise
            # else a host of IPv6 alone
            return socket.create_server((LOOPBACK_6, port), family=socket.AF_INET6, backlog=backlog)
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(
                ("", port), family=socket.AF_INET6, backlog=backlog, dualstack_ipv6=True
            )
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise
            # else the kernel has IPv6, and this network namespace has not
    return socket.create_server(("", port), backlog=backlog)


def port_taken(port: int, *, only_here: bool = False) -> str | None:
    """Why nothing can listen at this TCP port: who holds it, as far as that can be seen; None where it is free.

    Args:
        only_here: whether loopback alone is wanted, where ranks of one machine meet.
    """
    try:
        listening_socket(port, only_here=only_here).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return f"port {port} is taken{_by_whom(port)}"
        return f"port {port} can't be listened at: {error.strerror}"
    return None


def _by_whom(port: int) -> str:
    """The process that listens at a port, if the kernel shows it: of other users it does not."""
    import psutil  # here: a plan does not ask

    try:
        held = [
            each.pid
            for each in psutil.net_connections("tcp")
            if each.status == psutil.CONN_LISTEN and each.laddr[1:2] == (port,) and each.pid
        ]
        return f" by {psutil.Process(held[0]).name()} (process {held[0]})" if held else " by another process"
    except (psutil.Error, OSError):  # it has just ended, or may not be asked for
        return " by another process"


def loopback_address() -> str:
    """127.0.0.1, or ::1 where this machine has no other."""
    return LOOPBACK if address_towards(socket.AF_INET, LOOPBACK) else LOOPBACK_6


def loopback_card() -> str | None:
    """The name of the loopback interface; None where it has none of the usual ones."""
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in ("lo", "lo0") if name in names), None)


def is_loopback(name: str) -> bool:
    """Whether ``name`` says by itself that it is the machine that reads it: ``localhost``, 127.0.0.1, ::1. A host name
    that resolves to such an address here may mean this machine to others as well."""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name.lower() == "localhost"
