"""Strict JSON reader: values with the line of every key; refuses duplicate keys and NaN."""

from __future__ import annotations

import json
import re
from pathlib import Path

from dstrain.config.text_file import read_text, shown
from dstrain.config.yaml_reader import Document
from dstrain.errors import DstrainError

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]:,]|\n')


def read_json(path: Path, *, where: str) -> Document:
    """Read a JSON file that holds one object.

    Raises:
        DstrainError: the file can't be read, is no JSON, or has a key twice.
    """
    text = read_text(path, where=where)
    name = shown(path)
    try:
        values = json.loads(text, parse_constant=_no_constant, parse_int=_whole_number)
    except json.JSONDecodeError as error:
        raise DstrainError(
            f"not valid JSON: {error.msg}",
            where=f"{name}:{error.lineno}",
            hint="JSON allows no comments and no trailing commas, and strings need double quotes",
        ) from None
    except ValueError as error:
        raise DstrainError(str(error), where=name, hint="write a number, or null") from None
    except RecursionError:
        raise DstrainError("nested too deeply", where=name, hint="a DeepSpeed JSON file") from None
    if not isinstance(values, dict):
        raise DstrainError("expected a JSON object", where=name, hint='write {"KEY": VALUE, ...}')
    return Document(values, _lines_of_keys(text, name))


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is not JSON")


def _whole_number(digits: str) -> int:
    try:
        return int(digits)
    except ValueError:
        raise ValueError(f"a number with {len(digits.lstrip('-')):,} digits") from None


def _lines_of_keys(text: str, name: str) -> dict[tuple[str, ...], int]:
    """The line (from 1) of each key that is not inside a list, by its path. ``text`` is valid JSON.

    Python's json tells no places, and YAML readers do not take all of JSON (a tab, a colon on the next line).
    """
    lines: dict[tuple[str, ...], int] = {}
    line, depth_of_lists = 1, 0
    path: list[str] = []  # of the objects that are open; the last is the key whose value comes
    key_expected = False
    opened: list[bool] = []  # for each open bracket, whether it is an object's
    for match in _TOKEN.finditer(text):
        token = match.group()
        if token == "\n":
            line += 1
        elif token == "{":
            opened.append(True)
            path.append("")
            key_expected = True
        elif token == "[":
            opened.append(False)
            depth_of_lists += 1
        elif token in "}]":
            if opened.pop():
                path.pop()
            else:
                depth_of_lists -= 1
            key_expected = False
        elif token == ",":
            key_expected = opened[-1]
        elif token == ":":
            key_expected = False
        elif key_expected:
            path[-1] = json.loads(token)
            if depth_of_lists == 0:
                _note(lines, tuple(path), line, name)
    return lines


def _note(lines: dict[tuple[str, ...], int], path: tuple[str, ...], line: int, name: str) -> None:
    if path in lines:
        raise DstrainError(
            f"duplicate key {path[-1]!r} (first defined on line {lines[path]})",
            where=f"{name}:{line}",
            hint="remove one of the two",
        )
    lines[path] = line
