"""Writes ``dstrain/config/deepspeed_keys.json``: every key that the installed DeepSpeed reads, found by asking it.

    python -m tools.deepspeed_keys.table > dstrain/config/deepspeed_keys.json

DeepSpeed has no schema. Half of its blocks are pydantic models; of the others only the code that reads them knows the
keys. So a config is built from a dictionary that notes what is looked up in it (`looked_up`), and each key that was
looked up is then tried as a block of its own, until nothing new is found. What each key takes is found in the same
way, by trying values (`models`). Words come from the strings below pydantic's fields; `notes` and `descriptions`
have the rest.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from typing import Any

import deepspeed
from deepspeed.runtime import config as deepspeed_config

from tools.deepspeed_keys.descriptions import DESCRIPTIONS
from tools.deepspeed_keys.effects import effects_of
from tools.deepspeed_keys.looked_up import Path, looked_up, nested
from tools.deepspeed_keys.models import Node, fields, model_of, one_line
from tools.deepspeed_keys.notes import ALIASES, ANY_CASE, FREE, READ_ELSEWHERE, REMOVED, TYPES
from tools.deepspeed_keys.parameters import OPTIMIZERS, SCHEDULERS, parameters

# What a block may have to hold before DeepSpeed reads the rest of it.
_OPENERS: tuple[dict[str, Any], ...] = ({}, {"enabled": True}, {"type": "adam"}, {"throughput": {}})
_TEXTS = ["text of an integer", "text of a float", "text of a boolean", "text"]
# What keys that no model checks take, by the type of their default.
_PLAIN: dict[str, list[str]] = {
    "bool": ["boolean"],
    "int": ["integer"],
    "float": ["integer", "whole float", "float"],
    "str": _TEXTS,
    "list": ["list"],
    "dict": ["object"],
}


def table() -> dict[str, Any]:
    """The whole table: ``deepspeed`` (the version) and ``keys``, a tree of nodes.

    A node has ``accepts`` (the kinds of values, see `models.SAMPLES`), ``type`` (in words) and ``default``; or
    ``keys``, if it is a block. It may have ``description``, ``choices`` (``any_case``: in any case), limits,
    ``same_as`` (another name of a key), ``deprecated`` or ``removed`` (what to do instead), ``free`` (any key may
    stand in it), ``null`` (it may be null), ``effects`` (of a key, see
    `effects`), ``of`` (the types of optimizer or schedule that take it), ``model`` (pydantic reads it).
    """
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    keys = _block(())
    for name, reason in deepspeed_config._REMOVED_TOP_LEVEL_CONFIG_KEYS.items():
        keys[name] = {"removed": one_line(reason)}
    for name, reason in deepspeed_config._REMOVED_ZERO_CONFIG_KEYS.items():
        keys["zero_optimization"]["keys"][name] = {"removed": one_line(reason)}
    keys["optimizer"]["keys"]["params"] = parameters(OPTIMIZERS)
    keys["scheduler"]["keys"]["params"] = parameters(SCHEDULERS)
    for dotted, default in READ_ELSEWHERE.items():
        path = tuple(dotted.split("."))
        _siblings(keys, path)[path[-1]] = _plain(path, default)
    for dotted, instead in REMOVED.items():
        path = tuple(dotted.split("."))
        _siblings(keys, path)[path[-1]] = {"removed": instead}
    for dotted, other in ALIASES.items():
        path = tuple(dotted.split("."))
        _siblings(keys, path)[path[-1]] = {"same_as": other}
    for path, node in _walk(keys):
        _describe(path, node)
        if "keys" not in node and not {"removed", "deprecated", "same_as"} & set(node):
            node["effects"] = ", ".join(effects_of(path))
    return {"deepspeed": deepspeed.__version__, "keys": _sorted(keys)}


def _block(path: Path) -> dict[str, Node]:
    """The keys of the block at ``path``, found by letting DeepSpeed read it."""
    found: dict[str, Any] = {}
    for opener in _OPENERS if path else ({},):
        seen, _ = looked_up(nested(path, opener))
        for place, default in seen.items():
            if place[:-1] == path and found.get(place[-1]) is None:
                found[place[-1]] = default
    removed = deepspeed_config._REMOVED_TOP_LEVEL_CONFIG_KEYS if not path else {}
    return {key: _node((*path, key), default) for key, default in found.items() if key not in removed}


def _node(path: Path, default: Any) -> Node:
    """What stands at ``path``: a model's block, a block read key by key, or a value."""
    model = model_of(path)
    if model is not None:
        return {"keys": fields(model), "model": True, "description": one_line(model.__doc__ or "")}
    dotted = ".".join(path)
    if dotted == "pipeline":  # copied whole over its defaults
        defaults = deepspeed_config.get_pipeline_config({})
        return {"keys": {key: _plain((*path, key), value) for key, value in defaults.items()}}
    if dotted not in TYPES and (default is None or isinstance(default, dict)):
        keys = _block(path)
        if keys or dotted in FREE:
            return {"keys": keys} | ({"free": True} if dotted in FREE else {})
    return _plain(path, default)


def _plain(path: Path, default: Any) -> Node:
    """A value that DeepSpeed reads as it stands: what it takes follows from its default, or from our notes."""
    dotted = ".".join(path)
    noted = TYPES.get(dotted)
    choices: list[Any] | None = None
    if isinstance(noted, list):
        choices, types = noted, ["str", "null"] if default is None else ["str"]
    elif noted is not None:
        types = noted.split("|")
    else:
        assert default is not None, f"{dotted} has no default to take its type from: note it in TYPES"
        types = [type(default).__name__]
    accepts = [kind for name in types for kind in _PLAIN.get(name, [name])]
    node: Node = {"type": _describe_type(types), "accepts": accepts, "default": default}
    if choices:
        node["choices"] = choices
    if dotted in ANY_CASE:
        node["any_case"] = True
    return node


def _describe(path: Path, node: Node) -> None:
    """Our own description where DeepSpeed has none; and whether a block may be null."""
    dotted = ".".join(path)
    if not node.get("description"):
        node.pop("description", None)
        if dotted in DESCRIPTIONS:
            node["description"] = DESCRIPTIONS[dotted]
    if "keys" in node and looked_up(nested(path, None))[1] is None:
        node["null"] = True


def _describe_type(types: list[str]) -> str:
    """``int``, ``null`` -> ``integer or null``."""
    names = {"bool": "boolean", "int": "integer", "float": "number", "str": "text", "dict": "object"}
    return " or ".join(names.get(name, name) for name in types)


def _siblings(keys: dict[str, Node], path: Path) -> dict[str, Node]:
    for key in path[:-1]:
        keys = keys.setdefault(key, {"keys": {}}).setdefault("keys", {})
    return keys


def _walk(keys: dict[str, Node], path: Path = ()) -> Iterator[tuple[Path, Node]]:
    for key, node in keys.items():
        yield (*path, key), node
        yield from _walk(node.get("keys", {}), (*path, key))


def _sorted(keys: dict[str, Node]) -> dict[str, Node]:
    return {
        key: keys[key] | ({"keys": _sorted(keys[key]["keys"])} if "keys" in keys[key] else {})
        for key in sorted(keys)
    }


def text() -> str:
    """The file's content."""
    return json.dumps(table(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    sys.stdout.write(text())
