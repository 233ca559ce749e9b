"""Descriptions of the types of config keys."""

from __future__ import annotations

import typing
from typing import Any

from dstrain.config.schema import LARGEST, TypeInWords

_NAMES = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "null"}
_LIMITS = {"gt": "greater than", "ge": "at least", "lt": "less than", "le": "at most"}


def describe_type(annotation: Any) -> str:
    """``fp32, bf16, fp16``; ``integer, greater than 0, or null``."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return ", ".join(map(str, parts))
    if origin is typing.Annotated:
        for each in parts[1:]:
            if isinstance(each, TypeInWords):
                return each.words
        limits = [_limit(each) for each in parts[1:]]
        return ", ".join(filter(None, [describe_type(parts[0]), *limits]))
    if origin is list:
        return f"list of {describe_type(parts[0])}"
    if annotation in _NAMES:
        return _NAMES[annotation]
    if parts and origin is not dict:
        words = [describe_type(part) for part in parts]
        return (", or " if "," in words[0] else " or ").join(words)
    return "KEY: VALUE lines"


def _limit(info: Any) -> str:
    """``greater than 0`` of pydantic's Field(gt=0) or of a limit in it; one that only catches slips is not said."""
    found = [
        f"{words} {getattr(each, bound):g}"
        for each in getattr(info, "metadata", (info,))
        for bound, words in _LIMITS.items()
        if getattr(each, bound, None) is not None and getattr(each, bound) < LARGEST
    ]
    return ", ".join(found)
