"""Datasets as a user may write them, outside of dstrain: good ones, and all that can be wrong with one."""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any


def lines(file: str, suffix: str = "") -> Iterator[str]:
    """The texts of a JSON Lines file."""
    with Path(file).open(encoding="utf-8") as stream:
        for line in stream:
            yield json.loads(line)["text"] + suffix


def numbered(count: int = 40, log: str | None = None) -> Iterator[str]:
    """So many texts. ``log``: a file that gets a line for each call."""
    print("to standard output")
    print("to standard error", file=sys.stderr)
    if log:
        with Path(log).open("a") as stream:
            stream.write(f"{os.getpid()}\n")
    for number in range(count):
        yield f"document {number}: " + "abc " * (number % 7)


class Numbered:
    """The same from a class."""

    def __init__(self, count: int = 40) -> None:
        self.count = count

    def __iter__(self) -> Iterator[str]:
        return numbered(self.count)


class Text(str):
    """What libraries give in place of a str."""

    def __str__(self) -> str:
        return "something else"


def texts() -> list[str]:
    return [Text(f"text {number}") for number in range(9)]


def grown(file: str) -> Iterator[str]:
    """One document more each time, up to the number in a file."""
    count = int(Path(file).read_text())
    Path(file).write_text(f"{count + 1}")
    return numbered(count)


def in_no_order() -> set[str]:
    return set(numbered())


def at_random() -> Iterator[str]:
    yield from (f"{random.random()} " * 9 for _ in range(20))


def broken(third: str) -> Iterator[Any]:
    """Two documents, and then something else."""
    yield from ("one", "two")
    if third == "raises":
        raise KeyError("no such row")
    if third == "exits":
        sys.exit(0)
    if third == "ends the process":
        os._exit(0)
    yield {"bytes": b"three", "none": None, "surrogate": "ab\ud800", "dict": {"text": "three"}}[third]


def refuses(path: str) -> Iterator[str]:
    raise FileNotFoundError(2, "No such file or directory", path)


def one_text() -> str:
    return "all of it"


def mapping() -> dict[str, str]:
    return {"text": "one"}


def nothing() -> list[str]:
    return []


def empty() -> list[str]:
    return ["", ""]


async def later() -> AsyncIterator[str]:
    yield "one"


DOCUMENTS = ["one", "two"]
