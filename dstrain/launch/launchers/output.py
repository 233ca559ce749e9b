"""Recognises lost ranks in the output of launchers."""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass

HOST_PREFIX = r"^(?:(?P<host>[A-Za-z0-9._-]+): )?"
"""pdsh puts ``host: `` before each line of what it has started on another host."""

_BY_DESCRIPTION = {signal.strsignal(number): int(number) for number in signal.valid_signals()}


@dataclass(frozen=True)
class KilledRank:
    """A rank was killed by ``signal``. ``host`` is None where the line does not name it: it is this one."""

    host: str | None
    signal: int


def killed_rank(pattern: re.Pattern[str], line: str) -> KilledRank | None:
    """What ``pattern`` finds in a line: its groups are ``host`` and ``signal``, or ``description`` with the signal in
    strsignal(3)'s words. None for SIGTERM, which launchers send themselves, and for what is no signal."""
    match = pattern.search(line)
    if match is None:
        return None
    found = match.groupdict()
    number = int(found["signal"][:4]) if "signal" in found else _BY_DESCRIPTION.get(found["description"], 0)
    if number == signal.SIGTERM or number not in signal.valid_signals():
        return None
    return KilledRank(found["host"], number)
