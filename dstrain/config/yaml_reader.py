"""Strict YAML reader: values with their lines; refuses duplicate keys; reads ``3e-4`` as a number.

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

from dstrain.config.text_file import read_text, shown
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

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """yaml's own, with a place for what Python says of a value that is not what its tag or its look promises."""
        if isinstance(node, yaml.ScalarNode) and node.tag.endswith(":int") and len(node.value) > _MOST_DIGITS:
            raise yaml.constructor.ConstructorError(
                None, None, f"a number with {len(node.value):,} digits", node.start_mark
            )
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError):
            tag = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(
                None, None, f"this is not a valid {tag}, although its tag (!) says so", node.start_mark
            ) from None


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


_MOST_VALUES = 100_000
_MOST_DIGITS = 400
_FORM = "write KEY: VALUE lines, as in ds_configs/recipes/"
# Words of the YAML library's message, and what to do. {line}: where what it speaks of began.
_WAYS_OUT = (
    ("\\t", "indent with spaces, not with tabs"),
    ("quoted scalar", "close the quote of line {line}"),
    ("mapping values are not allowed", 'quote a text that contains a colon: "a: b"'),
    ("flow sequence", "close the bracket [ of line {line}"),
    ("flow mapping", "close the brace { of line {line}"),
    ("undefined alias", "*NAME refers to an earlier &NAME; quote a text that starts with a star"),
    ("single document", "remove the line ---: a file holds one config"),
    ("constructor for the tag", "remove the tag (!...): write a plain value"),
    ("tag (!)", "remove the tag, or write a value of that type"),
    ("digits", "write a smaller number"),
    ("a simple key", "KEY: VALUE, with a colon and a space after the key"),
    ("block mapping", "give all keys of one level the same indentation"),
)
_MAPPING_TAG = "tag:yaml.org,2002:map"
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
    return parse_yaml(read_text(path, where=where), name=shown(path))


def parse_yaml(text: str, *, name: str) -> Document:
    """Parse one YAML mapping; ``name`` stands in the messages. Raises as `read_yaml` does."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            raise DstrainError("the file is empty", where=name, hint=_FORM)
        if not isinstance(node, yaml.MappingNode) or node.tag != _MAPPING_TAG:
            raise DstrainError(
                "expected KEY: VALUE lines at top level",
                where=f"{name}:{node.start_mark.line + 1}",
                hint=_FORM,
            )
        _count(node, name, {}, set())
        lines: dict[tuple[str, ...], int] = {}
        _walk(node, (), lines, name)
        return Document(values=loader.construct_document(node), lines=lines)
    except yaml.MarkedYAMLError as error:
        raise _broken(error, name) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise DstrainError(
            f"not valid YAML: the character {chr(error.character)!a} is not allowed",
            where=f"{name}:{line}",
            hint='remove it, or write it as an escape in double quotes: "\\x1b"',
        ) from None
    except RecursionError:
        raise DstrainError("not valid YAML: brackets are nested too deeply", where=name, hint=_FORM) from None


def _broken(error: yaml.MarkedYAMLError, name: str) -> DstrainError:
    """What the YAML library found, with a way out."""
    mark = error.problem_mark or error.context_mark
    problem, context = str(error.problem), str(error.context)
    if problem.startswith("but "):
        problem = f"{context}, {problem}"
    hint = next((way for words, way in _WAYS_OUT if words in problem or words in context), _FORM)
    if error.context_mark is not None:
        hint = hint.replace("{line}", str(error.context_mark.line + 1))
    place = f"{name}:{mark.line + 1}" if mark else name
    return DstrainError(f"not valid YAML: {problem}", where=place, hint=hint)


def _count(node: yaml.Node, name: str, known: dict[int, int], above: set[int]) -> int:
    """The values below a node, those behind an alias as often as it stands there.

    Raises:
        DstrainError: they are more than anybody means, or an alias stands inside of what it stands for.
    """
    if id(node) in known:
        return known[id(node)]
    parts: list[tuple[yaml.Node, yaml.Node]] = []  # what is below, and the node whose line is told of it
    if isinstance(node, yaml.MappingNode):
        parts = [(value, key) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        parts = [(value, node) for value in node.value]
    above.add(id(node))
    total = 1
    for part, at in parts:
        where = f"{name}:{at.start_mark.line + 1}"
        if id(part) in above:
            raise DstrainError("this alias (*) refers to itself", where=where, hint="write the value out")
        total += _count(part, name, known, above)
        if total > _MOST_VALUES:
            raise DstrainError(
                f"aliases (*) expand to more than {_MOST_VALUES:,} values",
                where=where,
                hint="write the value out",
            )
    above.remove(id(node))
    known[id(node)] = total
    return total


def dump_yaml(values: dict[str, Any]) -> str:
    """YAML that `parse_yaml` reads back as the same values, each text and number in one line."""
    text: str = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=math.inf)
    return text


def parse_scalar(text: str) -> Any:
    """What YAML makes of ``text``; the text itself where it is no YAML."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError):
        return text


def _walk(
    node: yaml.MappingNode, path: tuple[str, ...], lines: dict[tuple[str, ...], int], name: str
) -> None:
    """Note the line of each key, refusing keys that are no strings or stand there twice."""
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode) or key_node.tag not in _KEY_TAGS:
            raise DstrainError("a key must be a string", where=f"{name}:{line}", hint="write KEY: VALUE")
        here = (*path, str(key_node.value))
        if here in lines:
            raise DstrainError(
                f"duplicate key {'.'.join(here)!r} (first defined on line {lines[here]})",
                where=f"{name}:{line}",
                hint="remove one of the two",
            )
        lines[here] = line
        if isinstance(value_node, yaml.MappingNode):
            _walk(value_node, here, lines, name)
