"""The commented YAML file that ``dstrain config init`` writes, and the descriptions of keys' types."""

from __future__ import annotations

import json
import textwrap
import typing
from typing import Any

from dstrain.config.schema import RunConfig
from dstrain.config.value_types import LARGEST, TypeInWords
from dstrain.config.yaml_reader import dump_yaml
from dstrain.version import __version__

_WIDTH = 100
GROUPS = {
    "model": "Model and data.",
    "steps": "Training length and batch size.",
    "loss": "Loss, optimizer and learning rate.",
    "zero": "Parallelism, precision and memory.",
    "name": "Run folder, checkpoints and launch.",
    "trackers": "Trackers, profiler and hooks.",
    "ds_config": "DeepSpeed keys.",
}
"""The headings, each with the key that it stands in front of: those of `RunConfig`."""

_HEAD = f"""\
# Config of dstrain {__version__}: every key, its meaning and its default.
# `dstrain config check FILE` reports errors, `dstrain plan --config FILE` shows what would run,
# `dstrain run --config FILE` trains. A key that is left out keeps its default.
# Keys in this file override those of a recipe named in it (recipe: NAME).
"""
_EXAMPLES = {"deepspeed": "# deepspeed:\n#   zero_optimization:\n#     reduce_bucket_size: 5.0e+7\n"}


def template() -> str:
    """YAML that means the defaults. Keys whose default is null, which stands for "derived", are commented out."""
    lines = [_HEAD]
    for key, field in RunConfig.model_fields.items():
        if key in GROUPS:
            lines.append(f"\n# --- {GROUPS[key]}\n\n")
        value = field.get_default()
        words = describe_type(field.rebuild_annotation()).removesuffix(" or null").removesuffix(",")
        text = f"{field.description} ({words})" if field.description else words
        lines += [f"# {line}\n" for line in textwrap.wrap(text, _WIDTH - 2)]
        lines.append(_EXAMPLES.get(key) or _line(key, value))
        lines.append("\n")
    return "".join(lines).rstrip("\n") + "\n"


def _line(key: str, value: Any) -> str:
    if value is None:
        return f"# {key}:\n"
    return f"{key}: {json.dumps(value)}\n" if isinstance(value, list) else dump_yaml({key: value})


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
