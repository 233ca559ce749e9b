"""Places in a stream, and what a checkpoint keeps to go on from one without reading what comes before it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from dstrain.errors import DstrainError


@dataclass(frozen=True)
class Place:
    """Where a block of documents begins.

    Attributes:
        epoch: how often all documents came before.
        shard: how many shards of the epoch came before, in its own order.
        record: how many records of this shard came before.
        part: how many parts of this record came before, of a document that is divided for its length.
        block: how many blocks of the epoch came before.
    """

    epoch: int = 0
    shard: int = 0
    record: int = 0
    part: int = 0
    block: int = 0


@dataclass(frozen=True)
class StreamState:
    """How to go on at a row.

    Attributes:
        place: where the block begins that holds the first token of the row ``first``.
        skip: how many tokens of this block, in its shuffled order, are in rows before that.
        first: the number of the first row that is made from there.
        row: the row to go on at; those from ``first`` on are made once more for it.
        check: a hash of the rows that are made together with it; empty where they were not made yet.
    """

    place: Place = Place()
    skip: int = 0
    first: int = 0
    row: int = 0
    check: str = ""

    def at(self, row: int) -> StreamState:
        """The same rows, to go on at another of them."""
        return replace(self, row=row)

    def to_json(self) -> dict[str, Any]:
        """As one flat object of JSON."""
        return {**asdict(self.place), **{one.name: getattr(self, one.name) for one in fields(self)[1:]}}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> StreamState:
        """The reverse of `to_json`.

        Raises:
            DstrainError: it is no such object.
        """
        names = {one.name for one in (*fields(Place), *fields(cls)[1:])}
        numbers = names - {"check"}
        if (
            not isinstance(value, Mapping)
            or set(value) != names
            or not isinstance(value["check"], str)
            or not all(type(value[name]) is int and value[name] >= 0 for name in numbers)
            or value["first"] > value["row"]
        ):
            raise DstrainError(
                f"this is no state of a stream: {str(value)[:200]}",
                hint="the checkpoint is of another version, or damaged: resume from an older one",
            )
        return cls(
            Place(**{one.name: value[one.name] for one in fields(Place)}),
            **{one.name: value[one.name] for one in fields(cls)[1:]},
        )
