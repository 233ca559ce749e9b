"""Parses durations: ``90s``, ``20m``, ``3h50m``, ``2d``."""

from __future__ import annotations

import re

_PARTS = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")
_SECONDS = 86_400, 3_600, 60, 1


def seconds(text: str) -> int:
    """The seconds of a duration such as ``3h50m``.

    Raises:
        ValueError: it is not written so, or is 0.
    """
    match = _PARTS.fullmatch(text.strip())
    total = sum(int(n or 0) * unit for n, unit in zip(match.groups(), _SECONDS, strict=True)) if match else 0
    if total == 0:
        raise ValueError(f"{text!r} is not a duration such as 90s, 20m, 3h50m, 2d")
    return total
