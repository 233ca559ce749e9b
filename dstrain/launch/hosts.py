"""Reads the hostfile: the machines of a run, and the number of processes on each.

The format is DeepSpeed's own (``name slots=N``), read more strictly: what DeepSpeed accepts and then
gets wrong (a bare host, ``slots=0``, trailing words) is refused here with its line.
"""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

from dstrain.config.text_file import read_text, shown
from dstrain.errors import DstrainError
from dstrain.planning.layout import Host
from dstrain.runs.this_machine import address_towards

# A name goes into the command lines of ssh and pdsh: nothing that an option parser or a shell could read
# as anything but a name is let through. Nor a colon: to pdsh `exec:n2` is a command that runs here.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_SLOTS = re.compile(r"[0-9]{1,6}")


def read_hostfile(path: str | os.PathLike[str]) -> tuple[Host, ...]:
    """Read ``name slots=N`` lines, in their order; ``#`` starts a comment, blank lines are skipped.

    Raises:
        DstrainError: the file is missing, unreadable, not UTF-8 or empty, or a line is not a host; ``where``
            is ``path:line``.
    """
    return tuple(numbered_hosts(path))


def numbered_hosts(path: str | os.PathLike[str]) -> dict[Host, int]:
    """The hosts of `read_hostfile` with their lines, counted from 1. Raises DstrainError as that does."""
    if not Path(path).exists():
        raise DstrainError(
            "hostfile not found",
            hint="write one line per host: `name slots=N`, where N is its number of GPUs",
            where=shown(path),
        )
    text = read_text(Path(path), where="the hostfile")
    hosts: dict[Host, int] = {}
    # Not splitlines(): that would also break lines at form feeds and Unicode separators.
    for number, raw in enumerate(text.split("\n"), start=1):
        words = raw.split("#", 1)[0].split()
        if not words:
            continue
        where = f"{path}:{number}"
        host = _parse(words, where)
        for other, line in hosts.items():
            if _one_name(host.name, other.name):
                alias = "" if host.name == other.name else f", as {other.name}"
                raise DstrainError(
                    f"duplicate host {host.name} (first listed on line {line}{alias})",
                    hint="give each host one line, with all of its slots",
                    where=where,
                )
        hosts[host] = number
    if not hosts:
        raise DstrainError(
            "the hostfile lists no hosts", hint="write one line per host: `name slots=N`", where=f"{path}:1"
        )
    return hosts


def _parse(words: list[str], where: str) -> Host:
    name = words[0]
    if not _NAME.fullmatch(name):
        hint = "use letters, digits and . _ - only, and a letter or digit at the start"
        if "@" in name:
            hint = "put the user name for this host into ~/.ssh/config (`User ...`)"
        elif ":" in name:
            hint = (
                "pdsh takes no colon: give an IPv6 address a name, and a port to ~/.ssh/config (`Port ...`)"
            )
        raise DstrainError(f"{name!r} is not a host name", hint=hint, where=where)
    if len(words) == 1:
        raise DstrainError(
            f"host {name} has no slots",
            hint=f"write `{name} slots=N`, where N is its number of GPUs",
            where=where,
        )
    key, equals, value = words[1].partition("=")
    if key != "slots" or not equals:
        raise DstrainError(
            f"expected slots=N, found {words[1]!r}", hint=f"write `{name} slots=N`", where=where
        )
    if not _SLOTS.fullmatch(value) or int(value) == 0:
        raise DstrainError(
            f"slots={value} is not a number of processes",
            hint=f"write a whole number, 1 or more, without spaces: `{name} slots=8`",
            where=where,
        )
    if len(words) > 2:
        raise DstrainError(
            f"unexpected text {' '.join(words[2:])!r}",
            hint=f"write `{name} slots={int(value)}` and nothing else; `#` starts a comment",
            where=where,
        )
    return Host(name, int(value))


def is_this_host(name: str) -> bool:
    """Whether ``name`` (host name or address) is the machine that asks; one that can't be resolved is not."""
    if name.lower() == "localhost" or _one_name(name, socket.gethostname()):
        return True
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError):
        return False
    return any(_is_own_address(family, address[0]) for family, _, _, _, address in found)


def _one_name(name: str, other: str) -> bool:
    """Whether these are one name, or a short and a full name. Two full names are left to the resolver."""
    name, other = name.lower(), other.lower()
    if name == other:
        return True
    one_is_short = ("." in name) != ("." in other)
    if not one_is_short or name.split(".")[0] != other.split(".")[0]:
        return False
    return not _is_address(name) and not _is_address(other)


def _is_address(name: str) -> bool:
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, name)
        except OSError:
            continue
        return True
    return False


def _is_own_address(family: int, address: str | int) -> bool:
    """The kernel reaches an own address from that same address.

    Trying to bind would be shorter, but succeeds for any address where ip_nonlocal_bind is set.
    """
    if family == socket.AF_INET and str(address).startswith("127."):
        return True  # all of 127.0.0.0/8, though the kernel answers from 127.0.0.1
    return address_towards(family, str(address)) == address
