"""What a row of the tables of bad inputs says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

GOOD = ["--model", "model", "--data", "text.jsonl", "--seq-len", "32", "--name", "x"]
"""Arguments with which a plan comes about: a bad input is the only thing that is wrong."""

FIFO = object()
"""A named pipe that nobody writes to, as what a row's file is."""

MEASURED = ("dstrain.model.measuring.measure",)
READ = ("dstrain.data.prepare",)


@dataclass(frozen=True)
class BadInput:
    """One mistake, and what the one message about it must hold.

    Attributes:
        arguments: behind ``dstrain``.
        place: a part of it that says where: a flag, ``file:line``, a variable.
        reason: a part that says what is wrong.
        hint: a part of what mends it.
        files: by name, text, bytes, or JSON values to write before; None makes a folder, `FIFO` a pipe.
        environment: variables that are set.
        looked: the modules that look at it in a process of their own, where that takes torch: a model's layers, or
            every byte of the data. Else nothing at all is started.
    """

    arguments: list[str]
    place: str
    reason: str
    hint: str
    files: Mapping[str, object] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    looked: tuple[str, ...] = ()


def run(*arguments: str, **rest: Any) -> BadInput:
    """A row for `dstrain run` with good arguments and these; the rest as of `bare`."""
    return bare("run", *GOOD, *arguments, **rest)


def bare(
    *arguments: str,
    place: str,
    reason: str,
    hint: str,
    files: Mapping[str, object] | None = None,
    looked: tuple[str, ...] = (),
    environment: Mapping[str, str] | None = None,
) -> BadInput:
    """A row for ``dstrain`` with these arguments alone."""
    return BadInput(list(arguments), place, reason, hint, files or {}, environment or {}, looked)


def config(text: str | bytes, line: int | None, reason: str, hint: str) -> BadInput:
    """A row for a YAML file of this content, whose message names this line; None: the file as a whole."""
    place = "c.yaml" + (f":{line}: " if line else ": ")
    return bare("plan", "--config", "c.yaml", place=place, reason=reason, hint=hint, files={"c.yaml": text})
