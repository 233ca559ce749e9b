"""Reads the documents of a corpus, with precise errors for what is not text."""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import Any, NamedTuple

from dstrain.data.chat.formats import FIELDS, TEXT, check_format, name_of_kind, text_of
from dstrain.data.listing.file_kinds import RECORD_KINDS
from dstrain.data.listing.sources import Source, SourceFile
from dstrain.data.reading.compressed import open_lines
from dstrain.data.reading.delimited import read_delimited
from dstrain.data.reading.encodings import not_utf8, refuse_other_kinds
from dstrain.data.reading.json_array import read_array
from dstrain.data.reading.records import JsonRecord, ReadPlace, bad_record
from dstrain.errors import DstrainError, way_out

_LINE = 'each line is one object: {"text": "..."}'
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
LARGEST_LINE, LARGEST_FILE = 2**26, 2**32
"""Bytes of a document, where no limit is set. A line is held in memory several times while it is parsed, and a packed
file does not show how long its lines are; a text file is as large as it looks."""
_LIMIT_KEY = "max_document_bytes"
_BLOCK = 2**20
_BEGINNING = ReadPlace()


class DocumentPart(NamedTuple):
    """A document, or a part of a long one.

    Attributes:
        text: encodable as UTF-8.
        bytes_read: how many of the source's bytes were read to get this far.
        last: whether the document ends with it.
        file, number: which of the source's files, and which of its documents, it is.
        left_out: the place of a record without a text, and why there is none; the text is then empty.
    """

    text: str
    bytes_read: int
    last: bool = True
    file: int = 0
    number: int = 0
    left_out: str = ""


def read_documents(source: Source, start: ReadPlace = _BEGINNING) -> Iterator[DocumentPart]:
    """The documents in the order of the source's files, and of the records of each, up to its limit.

    Line ends stay as they are; a byte order mark at a file's start is dropped. Blank lines of a JSON-lines
    file are no documents. A file that is one JSON array is read element by element. Of a text file there is 1 MiB in
    memory at a time, of others one line or element, or a few thousand rows of a table.

    Args:
        start: what is not given again.

    Raises:
        DstrainError: with the file, or the file and the line or row, of what can't be read as text.
    """
    _check_tables(source)
    before, read = 0, start.read
    for index, file in enumerate(source.files):
        number = start.number if index == start.file else 0
        if index >= start.file and read != source.limit:
            for part in documents_of(file, source, skip=number):
                yield DocumentPart(
                    part.text, before + part.bytes_read, part.last, index, number, part.left_out
                )
                number += part.last
                read += part.last
                if read == source.limit:
                    return
        before += file.size
    if not read:
        _refuse_empty_tables(source)


def documents_of(
    file: SourceFile, source: Source, *, skip: int = 0, group: int | None = None
) -> Iterator[DocumentPart]:
    """The documents of one of the source's files, with the bytes read of it alone.

    Args:
        skip, group: as of `records_of`.

    Raises:
        DstrainError: as `read_documents`.
    """
    with errors_of(file):
        if file.kind != "text":
            yield from _texts_of_records(file, source, skip, group)
        elif not skip:
            yield from _read_text(file, source.max_document_bytes or LARGEST_FILE)


@contextmanager
def errors_of(file: SourceFile) -> Iterator[None]:
    """What can't be read of a file becomes an error with its place."""
    try:
        yield
    except DstrainError as error:
        if file.kind == "text" and file.path.endswith(".bin"):
            error.hint = f"tokens of nanoGPT's are read with --set data_format=nanogpt; else {error.hint}"
        raise
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DstrainError(
            f"incomplete or damaged gzip file: {error}",
            hint="copy it again; `gzip -t` checks it",
            where=file.path,
        ) from error
    except OSError as error:
        raise DstrainError(
            f"can't be read: {error.strerror or error}", where=file.path, hint=way_out(error)
        ) from error


def _read_text(file: SourceFile, limit: int) -> Iterator[DocumentPart]:
    """The parts of a text file, read block by block."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    read, lines, beyond_ascii = 0, 1, False
    with open(file.path, "rb") as stream:
        block = stream.read(min(limit + 1, _BLOCK))
        refuse_other_kinds(block, file.path)
        while True:
            following = stream.read(_BLOCK) if block else b""
            if b"\0" in block:
                raise DstrainError(
                    f"this is a binary file (byte {read + block.index(0):,} is 0), not text",
                    hint="remove it from the source, or convert it to UTF-8 text",
                    where=file.path,
                )
            if read + len(block) > limit or file.size > limit:
                raise DstrainError(
                    f"this text file is a document of more than {limit:,} bytes",
                    hint=f"set {_LIMIT_KEY} to at least its size, or divide it",
                    where=file.path,
                )
            try:
                text = decoder.decode(
                    block.removeprefix(_BYTE_ORDER_MARK) if read == 0 else block, final=not following
                )
            except UnicodeDecodeError as error:
                raise not_utf8(error, file.path, lines, more_is_utf8=beyond_ascii) from None
            beyond_ascii = beyond_ascii or not text.isascii()
            read += len(block)
            lines += block.count(b"\n")
            yield DocumentPart(text, read, last=not following)
            if not following:
                return
            block = following


def read_records(
    source: Source,
    *,
    keep_errors: bool = False,
    start: ReadPlace = _BEGINNING,
    check_all: bool = True,
) -> Iterator[JsonRecord]:
    """The records of the source's files, in their order, up to its limit; its texts are passed over.

    Args:
        keep_errors: a line or an element that is no object, and a row that is none of its table, is a record with its
            error.
        start: what is not read again.
        check_all: look at the ends of all tables first, so that hours of work do not end at a broken one. Not for a
            look at the first record, which each rank takes at each start.

    Raises:
        DstrainError: as `read_documents`.
    """
    if check_all:
        _check_tables(source)
    before, read = 0, start.read
    for index, file in enumerate(source.files):
        if file.kind in RECORD_KINDS and index >= start.file and read != source.limit:
            skip = start.number if index == start.file else 0
            with errors_of(file):
                for number, record in enumerate(records_of(file, source, skip=skip), start=skip):
                    if record.error is not None and not keep_errors:
                        raise record.error
                    yield replace(record, bytes_read=before + record.bytes_read, file=index, number=number)
                    read += 1
                    if read == source.limit:
                        return
        before += file.size
    if not read:
        _refuse_empty_tables(source)


def records_of(
    file: SourceFile, source: Source, *, skip: int = 0, group: int | None = None
) -> Iterator[JsonRecord]:
    """The records of one of the source's files, with the bytes read of it alone.

    Args:
        skip: how many of them to leave out at the beginning; those of JSON lines are not parsed.
        group: of a parquet file, the row group whose records they are, from 0 on; None: all.

    Raises:
        DstrainError: as `read_documents`, but of the operating system's and gzip's errors.
    """
    limit, choices = source.max_document_bytes or LARGEST_LINE, source.choices
    if file.kind == "json lines":
        return _json_records(file, limit, skip)
    if file.kind == "csv":
        found = read_delimited(file.path, limit, choices.data_format, choices.data_fields)
        return islice(found, skip, None)
    from dstrain.data.reading.tables import read_table  # which costs the time to load Arrow

    text = {source.text_field} if source.text_field != "text" else set()
    rows = read_table(file, limit, frozenset({*FIELDS, *choices.data_fields.values(), *text}), group)
    return islice(rows, skip, None)


def _check_tables(source: Source) -> None:
    """Before anything is read of them, so that hours of work do not end at a file that shows now that it is broken."""
    tables = [file for file in source.files if file.kind in ("parquet", "arrow")]
    if tables:
        from dstrain.data.reading.tables import check_tables

        check_tables(tables)


def _refuse_empty_tables(source: Source) -> None:
    if any(file.kind == "csv" for file in source.files):
        raise DstrainError(
            "this table has no rows: there is nothing to train on",
            hint="name another file, or write it again with its rows",
            where=source.place,
        )


def _texts_of_records(
    file: SourceFile, source: Source, skip: int, group: int | None
) -> Iterator[DocumentPart]:
    for record in records_of(file, source, skip=skip, group=group):
        try:
            if record.error is not None:
                raise record.error
            if source.text_field == "text":
                check_format(record.fields, TEXT, source.first_text)
            text = text_of(record.fields, source.text_field)
        except DstrainError as error:
            if source.on_bad_record == "error":
                raise bad_record(record, error) from None
            reason = f"{record.where}: {record.placed(error).message}"
            yield DocumentPart("", record.bytes_read, left_out=reason)
        else:
            yield DocumentPart(text, record.bytes_read)


def _json_records(file: SourceFile, limit: int, skip: int) -> Iterator[JsonRecord]:
    with open(file.path, "rb") as raw:
        lines = open_lines(raw, file.path)
        plain_bytes, begun, beyond_ascii = 0, False, False
        for number, line in enumerate(iter(lambda: lines.readline(limit + 1), b""), start=1):
            where = f"{file.path}:{number}"
            plain_bytes += len(line)
            if number == 1:
                refuse_other_kinds(line, file.path)
                line = line.removeprefix(_BYTE_ORDER_MARK)
            if not begun and line.lstrip().startswith(b"["):
                elements = read_array(line, lines, file.path, number, limit, whole_number)
                for value, at in islice(elements, skip, None):
                    yield _record(value, "element", f"{file.path}:{at}", raw.tell())
                return
            begun = begun or bool(line.strip())
            if len(line) > limit:
                raise DstrainError(
                    f"this line has more than {limit:,} bytes",
                    hint=f"set {_LIMIT_KEY} higher, or divide the document; a packed file may hold far more than its"
                    " size",
                    where=where,
                )
            if line.strip() and skip:
                skip -= 1
            elif line.strip():
                # In a packed file it is the packed bytes that add up to the file's size.
                bytes_read = plain_bytes if lines is raw else raw.tell()
                text = _decode(line, file.path, number, beyond_ascii)
                beyond_ascii = beyond_ascii or not text.isascii()
                try:
                    value = _parsed(text)
                except json.JSONDecodeError as error:
                    message = f"this line is not JSON: {error.msg} at column {error.colno}"
                    wrong = DstrainError(message, hint=_way_to_lines(text, error), where=where)
                    yield JsonRecord({}, where, bytes_read, error=wrong)
                except RecursionError:
                    message = "this line's JSON is nested too deeply to be read"
                    wrong = DstrainError(message, hint=_LINE, where=where)
                    yield JsonRecord({}, where, bytes_read, error=wrong)
                else:
                    yield _record(value, "line", where, bytes_read)


def _way_to_lines(line: str, error: json.JSONDecodeError) -> str:
    """The hint for a line that is not JSON: an object that goes on, or is followed by another, is JSON all the same."""
    goes_on = error.pos >= len(line.rstrip()) and line.rstrip().endswith(("{", "[", ","))
    followed = error.msg == "Extra data" and line[error.pos] == "{"
    return f"{_LINE}; jq -c . FILE > NEW writes it so" if goes_on or followed else _LINE


def _record(value: Any, what: str, where: str, bytes_read: int) -> JsonRecord:
    if isinstance(value, dict):
        return JsonRecord(value, where, bytes_read, what)
    record = JsonRecord({}, where, bytes_read, what)
    wrong = DstrainError(f"this line holds {name_of_kind(value)}, not an object", hint=_LINE)
    return replace(record, error=record.placed(wrong))


def _parsed(text: str) -> Any:
    """A JSON value. Raises as `json.loads`, but for long numbers."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except ValueError:  # a number of more digits than Python reads at once; a function of our own is slow
        return json.loads(text, parse_int=whole_number)


def whole_number(digits: str) -> int | float:
    """A whole number of JSON. Of more digits than Python reads at once: as a float, since it is part of no text."""
    try:
        return int(digits)
    except ValueError:
        return float(digits)


def _decode(content: bytes, path: str, first_line: int, more_is_utf8: bool) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8(error, path, first_line, more_is_utf8=more_is_utf8) from None
