"""The run config as JSON Schema (draft 2020-12), for completion and checks in editors.

DeepSpeed's keys below ``deepspeed`` are those of the table that comes with dstrain. Where DeepSpeed takes a value in
several spellings (``"2"`` or ``true`` for a number), the schema has the plain one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dstrain.config.deepspeed_keys import Node, deepspeed_version, top_level
from dstrain.config.files import recipes
from dstrain.config.schema import RunConfig

_DRAFT = "https://json-schema.org/draft/2020-12/schema"
_TYPES = {"text": "string", "list": "array"}
_BOUNDS = {"gt": "exclusiveMinimum", "ge": "minimum", "lt": "exclusiveMaximum", "le": "maximum"}


def json_schema() -> dict[str, Any]:
    """The schema of a file for ``--config``."""
    schema = _without_titles(RunConfig.model_json_schema())
    properties = {
        "recipe": {"enum": recipes(), "description": "a recipe that the keys of this file override"},
        **schema["properties"],
    }
    properties["deepspeed"] = {
        **_block(top_level(), free=False),
        "description": f"keys of DeepSpeed {deepspeed_version()}, applied on top of the generated config",
        "default": {},
    }
    return {
        "$schema": _DRAFT,
        "title": "dstrain run config",
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
        "$defs": schema.get("$defs", {}),
    }


def _without_titles(schema: Any) -> Any:
    """pydantic makes a title of each name, which says nothing more."""
    if isinstance(schema, dict):
        return {
            key: _without_titles(value)
            for key, value in schema.items()
            if key != "title" or not isinstance(value, str)
        }
    return [_without_titles(each) for each in schema] if isinstance(schema, list) else schema


def _block(keys: Mapping[str, Node], *, free: bool) -> dict[str, Any]:
    properties = {
        name: _node(keys[node["same_as"]] if "same_as" in node else node)
        for name, node in keys.items()
        if not {"removed", "deprecated"} & set(node)
    }
    return {"type": "object", "properties": properties, "additionalProperties": free}


def _node(node: Node) -> dict[str, Any]:
    """A key's or a block's schema, with its description and default."""
    described = {key: node[key] for key in ("description", "default") if key in node}
    if "keys" in node:
        block = _block(node["keys"], free=bool(node.get("free")))
        return described | ({"anyOf": [block, {"type": "null"}]} if node.get("null") else block)
    value = _value(node)
    if value is None:
        return described
    return described | {"anyOf": [value, {"const": "auto"}]}


def _value(node: Node) -> dict[str, Any] | None:
    """What a key may hold; None: anything."""
    words = str(node["type"]).split(" or ")
    if "choices" in node:
        choices = list(node["choices"])
        if node.get("any_case"):
            choices += [spelled for each in node["choices"] for spelled in (each.lower(), each.upper())]
        return {"enum": list(dict.fromkeys([*choices, *([None] if "null" in words else [])]))}
    if words == ["any"]:
        return None
    if words == ["a Python object"]:
        return {"not": {}}
    types = [_TYPES.get(word, word) for word in words]
    return {"type": types} | {name: node[bound] for bound, name in _BOUNDS.items() if bound in node}
