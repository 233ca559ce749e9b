"""Where a config value comes from: default, recipe, file:line, --set, or a flag."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Origin:
    """The place that decided a value.

    ``kind`` is one of ``default``, ``recipe``, ``file``, ``set``, ``flag``; ``place`` is what to show
    (``quickstart.yaml:12``, ``--set``, ``--zero``).
    """

    kind: str
    place: str

    def __str__(self) -> str:
        return self.place


DEFAULT = Origin("default", "default")


REPEATED = {"trackers": "--tracker", "hooks": "--hook"}
"""Keys whose flag is given once for each item."""


def flag_name(key: str) -> str:
    """The flag that sets ``key``: ``seq_len`` -> ``--seq-len``."""
    return REPEATED.get(key) or "--" + key.replace("_", "-")


def as_flags(key: str, value: Any) -> list[str]:
    """What to type for this value of ``key``."""
    if isinstance(value, bool):
        return [flag_name(key) if value else flag_name(f"no_{key}")]
    return [flag_name(key), str(value)]


def flag_origin(key: str) -> Origin:
    return Origin("flag", flag_name(key))
