"""Tables of comma-separated or tab-separated values: their header, and their rows as records."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from itertools import chain

from dstrain.data.chat.formats import has_fields
from dstrain.data.reading.encodings import not_utf8, refuse_other_kinds
from dstrain.data.reading.records import JsonRecord
from dstrain.errors import DstrainError

_LARGEST_HEADER = 2**16
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_DELIMITERS = {".tsv": "\t", ".csv": ",;\t|"}
"""By suffix; the first that makes the fields of a format of the header is taken."""
_JSON_FIELDS = frozenset(
    {
        *("messages", "conversations", "conversation", "tools", "history", "chat_template_kwargs"),
        *("input_ids", "labels", "attention_mask", "position_ids"),
    }
)
"""Fields that hold no text: a cell has them as JSON."""


def header_of(path: str, data_format: str, data_fields: Mapping[str, str]) -> tuple[list[str], str] | None:
    """The names in a file's first line and its delimiter; None where they have not the fields of a format.

    Args:
        data_format, data_fields: as in `dstrain.data.chat.options`.

    Raises:
        OSError: the file can't be read.
    """
    with open(path, "rb") as stream:
        begin = stream.read(_LARGEST_HEADER).removeprefix(_BYTE_ORDER_MARK)
    try:
        text = begin[: begin.rfind(b"\n") + 1 or len(begin)].decode("utf-8")
    except UnicodeDecodeError:
        return None
    for delimiter in _DELIMITERS[path.lower()[-4:]]:
        try:
            names = next(csv.reader(text.splitlines(keepends=True), delimiter=delimiter), [])
        except csv.Error:
            continue
        if has_fields([name.strip() for name in names], data_format, data_fields):
            return names, delimiter
    return None


def read_delimited(
    path: str, limit: int, data_format: str, data_fields: Mapping[str, str]
) -> Iterator[JsonRecord]:
    """The rows behind the header, each with the line that it begins on.

    Cells are strings; those of fields that hold lists are JSON. Empty lines are no rows.

    Args:
        limit: the largest cell, in bytes.

    Raises:
        DstrainError: with the line of what can't be read as a table.
    """
    found = header_of(path, data_format, data_fields)
    delimiter = found[1] if found is not None else _DELIMITERS[path.lower()[-4:]][0]
    as_json = _JSON_FIELDS | {theirs for name, theirs in data_fields.items() if name in _JSON_FIELDS}
    csv.field_size_limit(limit)
    with open(path, "rb") as stream:
        lines = _Lines(stream, path)
        rows = csv.reader(lines, delimiter=delimiter, strict=True)
        names: list[str] | None = None
        while True:
            first = lines.number + 1
            try:
                row = next(rows, None)
            except csv.Error as error:
                raise _not_a_table(error, f"{path}:{first}", limit) from None
            if row is None:
                return
            if not row:
                continue
            if names is None:
                names = _names(row, f"{path}:{first}")
                continue
            yield _record(names, row, as_json, f"{path}:{first}", lines.bytes_read)


class _Lines:
    """The lines of a file as text, and how far they were read."""

    def __init__(self, stream: Iterator[bytes], path: str) -> None:
        self._path = path
        self.number = self.bytes_read = 0
        begin = next(stream, b"")
        refuse_other_kinds(begin, path)
        self._mark = len(begin) - len(begin.removeprefix(_BYTE_ORDER_MARK))
        self._lines = chain([begin[self._mark :]], stream)

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.bytes_read += len(line) + (0 if self.number else self._mark)
        self.number += 1
        try:
            return line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise not_utf8(error, self._path, self.number) from None


def _names(row: list[str], where: str) -> list[str]:
    names = [name.strip() for name in row]
    twice = next((name for name in names if name and names.count(name) > 1), None)
    if twice is not None:
        raise DstrainError(
            f"two columns are called {twice!r}", hint="give each column a name of its own", where=where
        )
    return names


def _record(names: list[str], row: list[str], as_json: frozenset[str], where: str, read: int) -> JsonRecord:
    record = JsonRecord({}, where, read, "row")
    if len(row) != len(names):
        wrong = DstrainError(
            f"this row has {len(row)} cells, and the header {len(names)}",
            hint="put cells that hold the delimiter or a line break in double quotes",
        )
        return JsonRecord({}, where, read, "row", record.placed(wrong))
    fields: dict[str, object] = {}
    for name, cell in zip(names, row, strict=True):
        fields[name] = cell
        if name in as_json:
            try:
                fields[name] = json.loads(cell) if cell.strip() else None
            except (ValueError, RecursionError) as error:
                wrong = DstrainError(
                    f"the cell {name!r} is not JSON: {error}",
                    hint="a list in a cell is written as JSON; or write JSON Lines or parquet",
                )
                return JsonRecord({}, where, read, "row", record.placed(wrong))
    return JsonRecord(fields, where, read, "row")


def _not_a_table(error: csv.Error, where: str, limit: int) -> DstrainError:
    if "field larger" in str(error):
        return DstrainError(
            f"this row has a cell of more than {limit:,} bytes",
            hint="set max_document_bytes higher; a double quote that is not closed makes one cell of all that follows",
            where=where,
        )
    if "unexpected end" in str(error):
        return DstrainError(
            "this row begins a cell with a double quote that is never closed",
            hint="close it, or copy the file again: it may be cut off",
            where=where,
        )
    return DstrainError(
        f"this row is not one of a table: {error}",
        hint="inside of a cell in double quotes, a double quote is written twice",
        where=where,
    )
