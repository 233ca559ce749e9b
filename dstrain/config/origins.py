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


FLAGS_OF_SECTIONS = {
    "adapter": {"adapter": "type", "adapter_r": "r", "adapter_alpha": "alpha"},
}
"""Sections of the config: what their flags set in them. The one that is named as the section sets its first key."""


def path_of(key: str, value: Any) -> tuple[str, ...]:
    """Where a value stands in the config: ``--adapter-r`` and the short form of a section set one key of it."""
    for section, flags in FLAGS_OF_SECTIONS.items():
        if key in flags and (key != section or isinstance(value, str)):
            return section, flags[key]
    return (key,)


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
