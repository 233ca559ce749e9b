"""DeepSpeed's config keys: which exist, what they accept, and suggestions for mistyped ones.

The table, ``deepspeed_keys.json``, is written by `tools.deepspeed_keys` out of the installed DeepSpeed, so that
nothing of DeepSpeed has to be imported to read it. DeepSpeed itself lets unknown keys pass in half of its blocks.
"""

from __future__ import annotations

import difflib
import json
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from dstrain.config.schema import field_names
from dstrain.config.values import KeyPath
from dstrain.errors import DstrainError

Node = Mapping[str, Any]

GONE = frozenset({"removed", "deprecated", "same_as"})
"""A node with one of these is no key to choose: not any more, or not under this name."""

_MOST_NAMED = 12
_NOT_HERE = "autotuning"  # it has keys of many names, and can't be used with dstrain: never what was meant
# As pydantic reads a boolean from a text.
_BOOLEAN_WORDS = {"0", "1", "off", "on", "f", "t", "false", "true", "n", "y", "no", "yes"}
_BOUNDS: dict[str, tuple[str, Callable[[float, float], bool]]] = {
    "gt": ("greater than", operator.gt),
    "ge": ("at least", operator.ge),
    "lt": ("less than", operator.lt),
    "le": ("at most", operator.le),
}


@dataclass(frozen=True)
class Wrong:
    """What is wrong with a key: ``depth`` says which part of its path (1: the first)."""

    depth: int
    message: str
    hint: str

    def at(self, where: str) -> DstrainError:
        return DstrainError(self.message, where=where, hint=self.hint)


@lru_cache(maxsize=1)
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(
        Path(__file__).with_name("deepspeed_keys.json").read_text(encoding="utf-8")
    )
    return table


def deepspeed_version() -> str:
    """The version of DeepSpeed that the table was made of."""
    return str(_table()["deepspeed"])


def top_level() -> Mapping[str, Node]:
    """The nodes at the top; those below a block stand in its ``keys``."""
    keys: Mapping[str, Node] = _table()["keys"]
    return keys


def all_keys() -> Iterator[tuple[KeyPath, Node]]:
    """Every key and block with its path, other names of a key and removed ones included."""
    yield from _below(top_level(), ())


def _below(keys: Mapping[str, Node], path: KeyPath) -> Iterator[tuple[KeyPath, Node]]:
    for key, node in keys.items():
        yield (*path, key), node
        yield from _below(node.get("keys", {}), (*path, key))


def canonical(path: KeyPath) -> KeyPath:
    """The same path with each key under the name that dstrain writes: ``bfloat16.enabled`` -> ``bf16.enabled``."""
    keys, found = top_level(), []
    for key in path:
        node = keys.get(key, {})
        name = node.get("same_as", key)
        found.append(name)
        keys = keys.get(name, {}).get("keys", {})
    return tuple(found)


def find(path: KeyPath) -> Node | None:
    """The node of a key or block under any of its names; None: DeepSpeed does not know it."""
    node: Node | None = None
    keys = top_level()
    for key in canonical(path):
        node = keys.get(key)
        if node is None:
            return None
        keys = node.get("keys", {})
    return node


def effects(path: KeyPath) -> frozenset[str]:
    """What a key does to a run beside its speed: kinds of `tools.deepspeed_keys.effects`. Empty for a block, and for
    what stands in one that takes any key."""
    node = find(path) or {}
    return frozenset(str(node["effects"]).split(", ")) if "effects" in node else frozenset()


def what_is_wrong(path: KeyPath, value: Any) -> Wrong | None:
    """What DeepSpeed would refuse, or let pass in silence, if this key had this value. None: nothing.

    ``auto`` is right everywhere: dstrain puts its own value there.
    """
    keys: Mapping[str, Node] = top_level()
    node: Node = {"keys": keys}
    for depth, key in enumerate(path, start=1):
        if "keys" not in node:
            dotted = ".".join(path[: depth - 1])
            if "object" in node.get("accepts", ["object"]):
                return None  # what stands in it is not DeepSpeed's to name
            return Wrong(
                depth - 1,
                f"{dotted} takes {_article(node['type'])}, not a block of keys",
                _about(dotted, node),
            )
        parent, keys = node, node["keys"]
        found = keys.get(key)
        if found is None:
            return None if parent.get("free") else _unknown(path[:depth], keys)
        node = keys[found["same_as"]] if "same_as" in found else found
        gone = node.get("removed") or node.get("deprecated")
        if gone:
            dotted = ".".join(path[:depth])
            state = "was removed from DeepSpeed" if "removed" in node else "is deprecated in DeepSpeed"
            return Wrong(depth, f"{dotted} {state}", gone)
    if value == "auto":
        return None
    return _wrong_value(path, node, value)


def _wrong_value(path: KeyPath, node: Node, value: Any) -> Wrong | None:
    """Whether a value is of a kind, a choice and a size that the key takes."""
    dotted, given = ".".join(path), f"{'.'.join(path)} = {json.dumps(value)}"
    if "keys" in node:
        if isinstance(value, dict) or (value is None and node.get("null")):
            return None
        inside = next(
            (key for key in ("stage", "enabled", "type", *node["keys"]) if key in node["keys"]), "KEY"
        )
        return Wrong(
            len(path),
            f"{dotted} must be a block of keys, not {json.dumps(value)}",
            f"{dotted}: {{{inside}: ...}} sets one of them",
        )
    if "accepts" not in node:  # a parameter of an optimizer or a schedule
        return None
    hint = _about(dotted, node)
    kind = kind_of(value)
    number = _number(value)
    is_switch = number is not None and not isinstance(value, bool) and str(node["type"]).startswith("boolean")
    if not node["accepts"]:
        return Wrong(len(path), f"{given}: it takes a Python object, which a file can't contain", "remove it")
    if kind not in node["accepts"] or (is_switch and number not in (0, 1) and "text" not in node["accepts"]):
        return Wrong(len(path), f"{given}: must be {_article(node['type'])}", hint)
    choices = node.get("choices")
    if choices and value is not None:
        same = value.lower() if node.get("any_case") and isinstance(value, str) else value
        known = [choice.lower() if node.get("any_case") else choice for choice in choices]
        if same not in known and number not in known:
            return Wrong(len(path), f"{given}: must be one of {', '.join(map(str, choices))}", hint)
    for bound, (words, holds) in _BOUNDS.items():
        if bound in node and number is not None and not holds(number, node[bound]):
            return Wrong(len(path), f"{given}: must be {words} {node[bound]}", hint)
    return None


def kind_of(value: Any) -> str:
    """The kind of a JSON value, as the table names it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int):
        return "integer"
    if isinstance(value, float):
        return "whole float" if value.is_integer() else "float"
    if isinstance(value, str):
        if re.fullmatch(r"[-+]?\d+", value):
            return "text of an integer"
        if re.fullmatch(r"[-+]?\d*\.\d+", value):
            return "text of a float"
        return "text of a boolean" if value.lower() in _BOOLEAN_WORDS else "text"
    return "list" if isinstance(value, list) else "object"


def _number(value: Any) -> float | None:
    """The number that a value stands for, be it as a text."""
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, str) and kind_of(value) in ("text of an integer", "text of a float"):
        return float(value)
    return None


def _unknown(path: KeyPath, siblings: Mapping[str, Node]) -> Wrong:
    """The message for a key that there is not: the nearest one, or the block in which it belongs."""
    key, block = path[-1], ".".join(path[:-1])
    inside = f" in {block}" if block else ""
    return Wrong(
        len(path), f"DeepSpeed has no key {key!r}{inside}", _what_was_meant(key, block, path[:-1], siblings)
    )


def _what_was_meant(key: str, block: str, parents: KeyPath, siblings: Mapping[str, Node]) -> str:
    names = [name for name, node in siblings.items() if "removed" not in node]
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.75)
    if near:
        return f"did you mean {'.'.join((*parents, near[0]))}?"
    places = [".".join(path) for path in homes_of(key)]
    if places:
        return f"it belongs elsewhere: {', '.join(places[:3])}{' ...' if len(places) > 3 else ''}"
    if key in field_names():
        return f"{key} is dstrain's own key: write it at top level, not under deepspeed (--set {key}=...)"
    near = nearest(key)
    if near:
        return f"did you mean {near[0]}?"
    if not block:
        return "its keys: https://www.deepspeed.ai/docs/config-json, or `dstrain config schema`"
    current = [name for name, node in siblings.items() if not GONE & set(node)]
    if len(current) > _MOST_NAMED:
        return f"`dstrain plan --explain deepspeed.{block}` lists its {len(current)} keys"
    return f"the keys of {block} are: {', '.join(current)}"


def homes_of(name: str) -> list[KeyPath]:
    """The paths of all keys whose last part is ``name``; those nearest to the top first."""
    found = [
        path
        for path, node in all_keys()
        if path[-1] == name and not GONE & set(node) and path[0] != _NOT_HERE
    ]
    return sorted(found, key=len)


def nearest(key: str) -> list[str]:
    """Dotted keys whose last part, or whole, is spelled almost like ``key``; the nearest first."""
    dotted = {".".join(path): path[-1] for path, node in all_keys() if not GONE & set(node)}
    by_name: dict[str, list[str]] = {}
    for whole, last in dotted.items():
        by_name.setdefault(last, []).append(whole)
    last_part = key.rpartition(".")[2]
    near = difflib.get_close_matches(key, dotted, n=2, cutoff=0.8)
    near += [
        whole
        for name in difflib.get_close_matches(last_part, by_name, n=2, cutoff=0.75)
        for whole in by_name[name][:2]
    ]
    return list(dict.fromkeys(near))


def _about(dotted: str, node: Node) -> str:
    """What a key takes, what it is for, and its default."""
    words = str(node.get("description", "")).partition(". ")[0].rstrip(".") or dotted
    default = f"; DeepSpeed's default is {json.dumps(node['default'])}" if "default" in node else ""
    return f"{_article(str(node['type']))}: {words}{default}"


def _article(words: str) -> str:
    first = words.split()[0]
    if first in ("text", "any", "null", "a"):
        return words
    return f"{'an' if first[0] in 'aeiou' else 'a'} {words}"
