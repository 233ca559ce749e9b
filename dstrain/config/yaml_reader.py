"""Strict YAML: a value and the line it stands on; duplicate keys refused; ``3e-4`` is a number.

Plain words are read as YAML 1.2's core schema does: ``on`` and ``2024-01-31`` are texts, ``010`` is no octal
number, ``1:30`` no count of seconds.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dstrain.errors import DstrainError

_IMPLICIT = {
    "float": (
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))",
        "-+.0123456789",
    ),
    "int": (r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)", "-+0123456789"),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "merge": (r"<<", "<"),
}


class _Loader(yaml.SafeLoader):
    """Takes plain words for numbers, booleans and null by the table above."""


class _Dumper(yaml.SafeDumper):
    """Puts into quotes what `_Loader` would not read back as a text, and every text into one line."""


for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {}
for _tag, (_pattern, _first) in _IMPLICIT.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first)
        )


def _text_in_one_line(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = None if text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_KEY_TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")
_Dumper.add_representer(str, _text_in_one_line)


@dataclass(frozen=True)
class Document:
    """A mapping read from YAML, and the line (from 1) of every key, by its path of keys."""

    values: dict[str, Any]
    lines: dict[tuple[str, ...], int]


def read_yaml(path: Path, *, where: str) -> Document:
    """Read a YAML file that holds one mapping.

    Raises:
        DstrainError: the file is missing, unreadable, not UTF-8, not YAML, not a mapping, or has a
            key twice; ``where`` names the file and the line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DstrainError(f"there is no file {path}", where=where, hint="check the path") from None
    except IsADirectoryError:
        raise DstrainError(f"{path} is a folder, not a file", where=where) from None
    except UnicodeDecodeError as error:
        raise DstrainError(f"{path} is not UTF-8 text ({error.reason})", where=where) from None
    except OSError as error:
        raise DstrainError(f"can't read {path}: {error.strerror}", where=where) from None
    return parse_yaml(text, name=str(path))


def parse_yaml(text: str, *, name: str) -> Document:
    """Parse one YAML mapping; ``name`` stands in the messages. Raises as `read_yaml` does."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{name}:{mark.line + 1}" if mark else name
        raise DstrainError(f"not valid YAML: {error.problem}", where=place) from None
    except yaml.YAMLError as error:
        raise DstrainError(f"not valid YAML: {error}", where=name) from None
    if node is None:
        raise DstrainError(
            "the file is empty", where=name, hint="write KEY: VALUE lines, as in ds_configs/recipes/"
        )
    if not isinstance(node, yaml.MappingNode):
        raise DstrainError(
            "expected KEY: VALUE lines at top level", where=f"{name}:{node.start_mark.line + 1}"
        )
    lines: dict[tuple[str, ...], int] = {}
    _walk(node, (), lines, name)
    try:
        values = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        place = f"{name}:{error.problem_mark.line + 1}" if error.problem_mark else name
        raise DstrainError(f"not valid YAML: {error.problem}", where=place) from None
    return Document(values=values, lines=lines)


def dump_yaml(values: dict[str, Any]) -> str:
    """YAML that `parse_yaml` reads back as the same values, each text and number in one line."""
    text: str = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=math.inf)
    return text


def parse_scalar(text: str) -> Any:
    """What YAML makes of ``text``; the text itself where it is no YAML."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError:
        return text


def _walk(
    node: yaml.MappingNode, path: tuple[str, ...], lines: dict[tuple[str, ...], int], name: str
) -> None:
    """Note the line of each key, refusing keys that are no strings or stand there twice."""
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode) or key_node.tag not in _KEY_TAGS:
            raise DstrainError("a key must be a word", where=f"{name}:{line}", hint="write KEY: VALUE")
        if value_node.start_mark.index < key_node.start_mark.index < value_node.end_mark.index:
            raise DstrainError("this alias (*) holds itself", where=f"{name}:{line}", hint="write it out")
        here = (*path, str(key_node.value))
        if here in lines:
            raise DstrainError(
                f"{'.'.join(here)} stands twice (first in line {lines[here]})",
                where=f"{name}:{line}",
                hint="keep one of the two",
            )
        lines[here] = line
        if isinstance(value_node, yaml.MappingNode):
            _walk(value_node, here, lines, name)
