"""A record of a file, whatever kind of file it is in: its fields, and its place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dstrain.errors import DstrainError


@dataclass(frozen=True)
class ReadPlace:
    """Where in a source reading goes on.

    Attributes:
        file, number: of the source's files those before, and of that one as many documents or records, are passed over.
        read: how many were read before, of all files.
    """

    file: int = 0
    number: int = 0
    read: int = 0


@dataclass(frozen=True)
class JsonRecord:
    """An object of a JSON-lines file, an element of a file that is one JSON array, or a row of a table.

    Attributes:
        fields: its values, as JSON would give them.
        where: its ``FILE:LINE``, or the row of a table.
        bytes_read: how many of the source's bytes were read to get there.
        what: of the file it is: a line, an element, or a row.
        error: why there is none.
        file, number: which of the source's files, and which of its records, it is.
    """

    fields: Mapping[str, Any]
    where: str
    bytes_read: int
    what: str = "line"
    error: DstrainError | None = None
    file: int = 0
    number: int = 0

    def placed(self, error: DstrainError) -> DstrainError:
        """What is wrong with this record, with its place."""
        error.where = self.where
        if self.what != "line":
            error.message = error.message.replace("this line", f"this {self.what}")
            error.hint = error.hint and error.hint.replace("each line", f"each {self.what}")
        return error


def bad_record(record: JsonRecord, error: DstrainError) -> DstrainError:
    """What is wrong with a record, with its place and the way to leave it out."""
    error.hint = f"{error.hint}; " if error.hint else ""
    error.hint += "on_bad_record: skip leaves such records out"
    return record.placed(error)
