"""Reads parquet and Arrow files: their rows as records, a part of a row group or batch in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc
import pyarrow.parquet as pq

from dstrain.data.chat.formats import has_fields
from dstrain.data.listing.sources import SourceFile
from dstrain.data.reading.encodings import refuse_other_kinds
from dstrain.data.reading.records import JsonRecord
from dstrain.errors import DstrainError, way_out

_PART_BYTES = 2**22
"""Of rows that become Python objects at once."""
_PART_ROWS = 4096
_PARQUET, _ENCRYPTED = b"PAR1", b"PARE"
_ARROW, _FEATHER_1 = b"ARROW1", b"FEA1"
_STREAM, _STREAM_END = b"\xff\xff\xff\xff", b"\xff\xff\xff\xff\0\0\0\0"
_AGAIN = "copy it again: it may be cut off"


@dataclass(frozen=True)
class _Part:
    """Some rows of a file that follow each other: those from number ``first`` on of a row group or batch ``group``."""

    rows: pa.RecordBatch
    group: int
    first: int
    bytes_read: int


def read_table(
    file: SourceFile, limit: int, fields: frozenset[str], group: int | None = None
) -> Iterator[JsonRecord]:
    """The rows in their order. Row groups, batches and rows are counted from 1.

    Nested columns become what JSON would give: objects for structs, without what is null in them, and for maps, arrays
    for lists. Columns that no format knows are null.

    Args:
        limit: the largest string in a row, in bytes.
        fields: the columns that may be of use.
        group: of a parquet file, the only row group to read, from 0 on.

    Raises:
        DstrainError: with the place of what can't be read.
    """
    what = "row group" if file.kind == "parquet" else "batch"
    parts = _parquet_parts(file, group) if file.kind == "parquet" else _arrow_parts(file)
    convert: list[Callable[[Any], Any] | None] | None = None
    for part in parts:
        names = part.rows.schema.names
        wanted = _wanted(names, fields)
        if convert is None:
            convert = [_converter(kind) for kind in part.rows.schema.types]
        place = f"{file.path}: {what} {part.group}"
        columns: list[Sequence[Any]] = []
        for name, column, plain in zip(names, part.rows.columns, convert, strict=True):
            if name not in wanted:
                columns.append([None] * part.rows.num_rows)
                continue
            _refuse_large(name, column, limit, place, part.first)
            values = _values(name, column, place, part.first)
            columns.append(
                values if plain is None else [None if one is None else plain(one) for one in values]
            )
        for row, values_of_row in enumerate(zip(*columns, strict=True)):
            where = f"{place}, row {part.first + row}"
            yield JsonRecord(dict(zip(names, values_of_row, strict=True)), where, part.bytes_read, "row")


def check_tables(files: Sequence[SourceFile]) -> None:
    """Refuse files that can't be read, columns whose types differ between files, and tables without any row.

    Only what stands at the files' ends is read.

    Raises:
        DstrainError: with both places.
    """
    seen: dict[str, tuple[pa.DataType, str]] = {}
    rows = 0
    for file in files:
        with _errors_of(file.path):
            schema, count = _parquet_schema(file) if file.kind == "parquet" else _arrow_schema(file)
        rows += count
        for column in schema:
            kind, path = seen.setdefault(column.name, (column.type, file.path))
            difference = _difference(column.name, kind, column.type)
            if difference is not None:
                name, first, second = difference
                raise DstrainError(
                    f"the column {name!r} holds {second} here, and {first} in {path}",
                    hint="write all files of a source with the same types, or name them as separate sources",
                    where=file.path,
                )
            if pa.types.is_null(kind):
                seen[column.name] = (column.type, file.path)
    if files and not rows:
        raise DstrainError(
            "this table has no rows: there is nothing to train on",
            hint="name another file, or write it again with its rows",
            where=files[0].path,
        )


def _wanted(names: Sequence[str], fields: frozenset[str]) -> frozenset[str]:
    """The columns that are read: where they have none of a format's fields, all, so that the message shows them."""
    known = fields.intersection(names)
    return known if has_fields(names, "auto", {}) or len(known) > 1 else frozenset(names)


def _parquet_schema(file: SourceFile) -> tuple[pa.Schema, int]:
    _check_begin_and_end(file)
    with pq.ParquetFile(file.path) as table:
        return _with_own_names(table.schema_arrow, file.path), table.metadata.num_rows


def _arrow_schema(file: SourceFile) -> tuple[pa.Schema, int]:
    """The schema and whether there are rows: 0 or 1."""
    with _open_arrow(file) as (schema, batches, _):
        return _with_own_names(schema, file.path), int(any(batch.num_rows for batch in batches))


def _with_own_names(schema: pa.Schema, path: str) -> pa.Schema:
    twice = next((name for name in schema.names if schema.names.count(name) > 1), None)
    if twice is not None:
        raise DstrainError(
            f"two columns are called {twice!r}", hint="give each column a name of its own", where=path
        )
    return schema


def rows_of_groups(file: SourceFile) -> list[int]:
    """How many rows each row group of a parquet file has. Raises DstrainError where it can't be read."""
    with _errors_of(file.path):
        _check_begin_and_end(file)
        with pq.ParquetFile(file.path) as table:
            return [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]


def _parquet_parts(file: SourceFile, only: int | None = None) -> Iterator[_Part]:
    with _errors_of(file.path):
        _check_begin_and_end(file)
        # Pages are read one by one, and not a whole row group at once.
        table = pq.ParquetFile(file.path, pre_buffer=False, buffer_size=2**20)
    with table:
        done, of_all = 0, table.metadata.num_rows
        for group in range(table.num_row_groups):
            of_group = table.metadata.row_group(group)
            if only not in (None, group):
                done += of_group.num_rows
                continue
            size = max(1, of_group.total_byte_size // max(1, of_group.num_rows))
            batches = table.iter_batches(
                batch_size=max(1, min(_PART_ROWS, _PART_BYTES // size)), row_groups=[group]
            )
            first = 1
            while True:
                with _errors_of(f"{file.path}: row group {group + 1}"):
                    batch = next(batches, None)
                if batch is None:
                    break
                done += batch.num_rows
                yield _Part(batch, group + 1, first, file.size * done // of_all)
                first += batch.num_rows


def _arrow_parts(file: SourceFile) -> Iterator[_Part]:
    with _open_arrow(file) as (_, batches, tell):
        number = 0
        while True:
            number += 1
            with _errors_of(f"{file.path}: batch {number}"):
                batch = next(batches, None)
            if batch is None:
                return
            size = max(1, batch.nbytes // max(1, batch.num_rows))
            step = max(1, min(_PART_ROWS, _PART_BYTES // size))
            for first in range(0, batch.num_rows, step):
                yield _Part(batch.slice(first, step), number, first + 1, tell())


@contextmanager
def _open_arrow(
    file: SourceFile,
) -> Iterator[tuple[pa.Schema, Iterator[pa.RecordBatch], Callable[[], int]]]:
    """The schema of a file or stream of Arrow's, its batches, and how many bytes of it were read."""
    with _errors_of(file.path):
        _check_begin_and_end(file)
        source = pa.memory_map(file.path)
    with source:
        with _errors_of(file.path):
            begin = source.read(len(_ARROW))
            source.seek(0)
            if begin == _ARROW:
                reader = pa.ipc.open_file(source)
                read = [0]

                def batches() -> Iterator[pa.RecordBatch]:
                    for number in range(reader.num_record_batches):
                        read[0] = file.size * (number + 1) // reader.num_record_batches
                        yield reader.get_batch(number)

                found = (reader.schema, batches(), lambda: read[0])
            else:
                stream = pa.ipc.open_stream(source)
                found = (stream.schema, iter(stream), source.tell)
        yield found


def _check_begin_and_end(file: SourceFile) -> None:
    """Refuse a file that is of another kind, or was cut: the end of one of Arrow's streams does not show else."""
    with open(file.path, "rb") as stream:
        begin = stream.read(4096)
        stream.seek(max(0, file.size - 8))
        end = stream.read(8)
    if file.kind == "parquet":
        if _ENCRYPTED in (begin[:4], end[-4:]):
            raise _encrypted(file.path)
        if begin.startswith(_PARQUET) and len(begin) >= 12:
            if not end.endswith(_PARQUET):
                raise DstrainError("this parquet file has no end", hint=_AGAIN, where=file.path)
            return
        _refuse(begin, _PARQUET, "a parquet file", file.path)
    if begin.startswith(_ARROW):
        if not end.endswith(_ARROW):
            raise DstrainError("this Arrow file has no end", hint=_AGAIN, where=file.path)
    elif begin.startswith(_STREAM):
        if end != _STREAM_END:
            raise DstrainError(
                "this Arrow stream has no end mark",
                hint=f"{_AGAIN}; whoever writes one must close the writer",
                where=file.path,
            )
    elif begin.startswith(_FEATHER_1):
        raise DstrainError(
            "this file is in the first version of Feather",
            hint="write it again with pyarrow.feather.write_feather",
            where=file.path,
        )
    else:
        _refuse(begin, _ARROW, "an Arrow file or stream", file.path)


def _refuse(begin: bytes, own: bytes, what: str, path: str) -> None:
    if not begin.startswith(own):
        refuse_other_kinds(begin, path)
    raise DstrainError(f"this is not {what}", hint=f"{_AGAIN}, or named by the wrong suffix", where=path)


def _encrypted(path: str) -> DstrainError:
    return DstrainError(
        "this parquet file is encrypted", hint="write it without encryption: dstrain has no keys", where=path
    )


@contextmanager
def _errors_of(place: str) -> Iterator[None]:
    try:
        yield
    except DstrainError:
        raise
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise DstrainError(
                f"can't be read: {error.strerror or error}", hint=way_out(error), where=place
            ) from error
        reason = " ".join(str(error).split())
        if "crypt" in reason.lower():
            raise _encrypted(place) from error
        raise DstrainError(f"damaged: {reason[:300]}", hint="copy it again", where=place) from error


def _values(name: str, column: pa.Array, place: str, first: int) -> Sequence[Any]:
    try:
        found: list[Any] = column.to_pylist()
        return found
    except UnicodeDecodeError:
        for row, value in enumerate(column):
            try:
                value.as_py()
            except UnicodeDecodeError as error:
                raise DstrainError(
                    f"the column {name!r} is not UTF-8: byte 0x{error.object[error.start]:02x} ({error.reason})",
                    hint="write it as UTF-8: in pandas, decode the bytes before to_parquet",
                    where=f"{place}, row {first + row}",
                ) from None
        raise


def _refuse_large(name: str, column: pa.Array, limit: int, place: str, first: int) -> None:
    if (
        not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type))
        or column.nbytes <= limit
    ):
        return
    too_large = pc.greater(pc.binary_length(column), limit)
    at = pc.index(too_large, True).as_py()
    if at >= 0:
        raise DstrainError(
            f"the column {name!r} has a string of more than {limit:,} bytes",
            hint="set max_document_bytes higher, or divide the document",
            where=f"{place}, row {first + at}",
        )


def _converter(kind: pa.DataType) -> Callable[[Any], Any] | None:
    """What makes JSON's values of Python's for a type; None: they are."""
    if getattr(kind, "extension_name", "") == "arrow.json":
        return json.loads
    if isinstance(kind, pa.BaseExtensionType):
        return _converter(kind.storage_type)
    if pa.types.is_struct(kind):
        inner = {field.name: _converter(field.type) for field in kind}
        return lambda value: {
            key: one if (plain := inner.get(key)) is None else plain(one)
            for key, one in value.items()
            if one is not None
        }
    if pa.types.is_map(kind):
        plain = _converter(kind.item_type) or _same
        return lambda value: {str(key): plain(one) for key, one in value if one is not None}
    if _is_list(kind):
        item = _converter(kind.value_type)
        if item is None:
            return None
        return lambda value: [None if one is None else item(one) for one in value]
    return None


def _same(value: Any) -> Any:
    return value


def _is_list(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_list(kind)
        or pa.types.is_large_list(kind)
        or pa.types.is_fixed_size_list(kind)
        or pa.types.is_list_view(kind)
        or pa.types.is_large_list_view(kind)
    )


def _difference(name: str, first: pa.DataType, second: pa.DataType) -> tuple[str, str, str] | None:
    """Where two types of a column give different values, with both in words; None where they do not."""
    first, second = _plain(first), _plain(second)
    if pa.types.is_null(first) or pa.types.is_null(second):
        return None
    if _is_list(first) and _is_list(second):
        return _difference(f"{name}[]", first.value_type, second.value_type)
    if pa.types.is_struct(first) and pa.types.is_struct(second):
        others = {field.name: field.type for field in second}
        for field in first:
            if field.name in others:
                found = _difference(f"{name}.{field.name}", field.type, others[field.name])
                if found is not None:
                    return found
        return None
    words = _in_words(first), _in_words(second)
    return None if words[0] == words[1] else (name, *words)


def _plain(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(kind):
        return _plain(kind.value_type)
    return _plain(kind.storage_type) if isinstance(kind, pa.BaseExtensionType) else kind


def _in_words(kind: pa.DataType) -> str:
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return "strings"
    if pa.types.is_integer(kind):
        return "whole numbers"
    if pa.types.is_floating(kind):
        return "numbers"
    if _is_list(kind):
        return "lists"
    return "objects" if pa.types.is_struct(kind) else str(kind)
