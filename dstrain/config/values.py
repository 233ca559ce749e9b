"""Helpers for config values: nested mappings by path, and durations: ``90s``, ``20m``, ``3h50m``, ``2d``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

KeyPath = tuple[str, ...]


def leaves(values: Mapping[str, Any], path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Every value that is no non-empty mapping, by its path of keys."""
    for key, value in values.items():
        here = (*path, str(key))
        if isinstance(value, dict) and value:
            yield from leaves(value, here)
        else:
            yield here, value


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
