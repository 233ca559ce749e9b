"""The keys of blocks that a pydantic model reads: from its fields, and by trying values."""

from __future__ import annotations

import ast
import enum
import inspect
import textwrap
import typing
from collections.abc import Iterator
from typing import Any

from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from pydantic import ValidationError

from tools.deepspeed_keys.looked_up import Path, looked_up, nested

Node = dict[str, Any]

_STRANGE = "a key that nobody has"
# A sample or more of each kind of JSON value that pydantic may tell apart. The kinds' names stand in the table.
SAMPLES: dict[str, tuple[Any, ...]] = {
    "boolean": (True, False),
    "integer": (0, 1, 2, 100),
    "whole float": (0.0, 1.0, 2.0),
    "float": (0.5, 2.5),
    "text of an integer": ("0", "1", "2"),
    "text of a float": ("0.5", "2.5"),
    "text of a boolean": ("yes", "off"),
    "text": ("some words",),
    "null": (None,),
    "list": ([], ["words"]),
    "object": ({}, {"a": 1}),
}
_WORDS = {
    bool: "boolean", int: "integer", float: "number", str: "text", list: "list", tuple: "list", dict: "object",
}  # fmt: skip


def model_of(path: Path) -> type[DeepSpeedConfigModel] | None:
    """The pydantic model that reads this block, if one does: it refuses a key that nobody has, and says its name."""
    _, error = looked_up(nested(path, {_STRANGE: 1}))
    if not isinstance(error, ValidationError):
        return None
    wrong = next((each for each in error.errors() if each["type"] == "extra_forbidden"), None)
    if wrong is None:
        return None
    model = next(each for each in _subclasses(DeepSpeedConfigModel) if each.__name__ == error.title)
    for name in wrong["loc"][:-1]:
        field = next(each for key, each in model.model_fields.items() if name in (key, each.alias))
        inner = _model_in(field.annotation)
        assert inner is not None, (path, wrong)
        model = inner
    return model


def _subclasses(model: type[Any]) -> Iterator[type[Any]]:
    for each in model.__subclasses__():
        yield each
        yield from _subclasses(each)


def fields(model: type[DeepSpeedConfigModel]) -> dict[str, Node]:
    """The keys of a model. A field with an alias is known under both names."""
    keys: dict[str, Node] = {}
    words = _strings_below_fields(model)
    for name, field in model.model_fields.items():
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        text = field.description or words.get(name, "")
        inner = _model_in(field.annotation)
        if inner is not None:
            node: Node = {"keys": fields(inner), "model": True}
        else:
            choices = _choices(field.annotation)
            accepts = _accepted(model, field.alias or name, choices)
            default = field.get_default(call_default_factory=True)
            node = {
                "type": _describe_annotation(field.annotation),
                "accepts": accepts,
                "default": as_json(default),
            }
            if choices:
                node["choices"] = choices
            for limit in field.metadata:
                for bound in ("gt", "ge", "lt", "le"):
                    if getattr(limit, bound, None) is not None:
                        node[bound] = getattr(limit, bound)
            by_hand = {"gt", "ge", "choices"}.isdisjoint(node) and node["type"] in ("integer", "number")
            if by_hand and not takes(model, field.alias or name, -1):  # a validator of the model's own
                node["ge"] = 0
        node["description"] = one_line(text)
        if extra.get("deprecated"):
            node["deprecated"] = f"use {extra['new_param']}"
        keys[field.alias or name] = node
        if field.alias:
            keys[name] = {"same_as": field.alias}
    return keys


def _accepted(model: type[DeepSpeedConfigModel], name: str, choices: list[Any] | None) -> list[str]:
    """The kinds of values of which the model takes at least one."""
    samples = SAMPLES | ({"text": tuple(choices)} if choices and isinstance(choices[0], str) else {})
    return [kind for kind, values in samples.items() if any(takes(model, name, value) for value in values)]


def takes(model: type[DeepSpeedConfigModel], name: str, value: Any) -> bool:
    """Whether the model takes this value for this key."""
    try:
        model(**{name: value})
    except (ValidationError, TypeError, AssertionError) as error:
        # What another field must be beside it is not this value's fault.
        return isinstance(error, ValidationError) and not any(each["loc"] for each in error.errors())
    return True


def _model_in(annotation: Any) -> type[DeepSpeedConfigModel] | None:
    """The model that an annotation such as ``Optional[Model]`` holds."""
    for part in (annotation, *typing.get_args(annotation)):
        if inspect.isclass(part) and issubclass(part, DeepSpeedConfigModel):
            return part
    return None


def _choices(annotation: Any) -> list[Any] | None:
    """The values of an enumeration or a Literal."""
    for part in (annotation, *typing.get_args(annotation)):
        if inspect.isclass(part) and issubclass(part, enum.Enum):
            return list(dict.fromkeys(member.value for member in part))
        if typing.get_origin(part) is typing.Literal:
            return list(typing.get_args(part))
    return None


def _strings_below_fields(model: type) -> dict[str, str]:
    """The string that stands below each field in the source; a second one is of the next field, if it has none."""
    body = ast.parse(textwrap.dedent(inspect.getsource(model))).body[0]
    assert isinstance(body, ast.ClassDef)
    words: dict[str, str] = {}
    field, left = "", ""
    for statement in body.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            field = statement.target.id
            if left:
                words[field], left = left, ""
        elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant) and field:
            text = str(statement.value.value)
            if field in words:
                left = text
            else:
                words[field] = text
        else:
            field, left = "", ""
    return words


def _describe_annotation(annotation: Any) -> str:
    """``Optional[int]`` -> ``integer or null``."""
    if annotation is type(None):
        return "null"
    if typing.get_origin(annotation) is typing.Union:
        return " or ".join(_describe_annotation(part) for part in typing.get_args(annotation))
    if typing.get_origin(annotation) is typing.Literal:
        return "text"
    kind = typing.get_origin(annotation) or annotation
    if inspect.isclass(kind) and issubclass(kind, enum.Enum):
        return "integer" if issubclass(kind, int) else "text"
    if kind in _WORDS:
        return _WORDS[kind]
    return "text" if getattr(kind, "__name__", "") == "Path" else "a Python object"


def one_line(text: str) -> str:
    """A description from the source without its line breaks."""
    return " ".join(text.split()).removeprefix("Deprecated, please ")


def as_json(value: Any) -> Any:
    """A default as JSON holds it."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, bool | int | float | str | None):
        return int(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if isinstance(value, (list, tuple)):
        return [as_json(each) for each in value]
    return {} if value == {} else str(value)
