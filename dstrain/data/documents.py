"""Reads the documents of a corpus, with precise errors for what is not text."""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import IO, Any

from dstrain.data.encodings import not_utf8, refuse_other_kinds
from dstrain.data.json_array import read_array
from dstrain.data.sources import Source, SourceFile
from dstrain.errors import DstrainError

TEXT_FIELD = "text"
_LINE = 'each line is one object: {"text": "..."}'
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
LARGEST_LINE, LARGEST_FILE = 2**26, 2**32
"""Bytes of a document, where no limit is set. A line is held in memory several times while it is parsed, and a packed
file does not show how long its lines are; a text file is as large as it looks."""
_LIMIT_KEY = "max_document_bytes"
_BLOCK = 2**20


@dataclass(frozen=True)
class DocumentPart:
    """A document, or a part of a long one.

    Attributes:
        text: encodable as UTF-8.
        bytes_read: how many of the source's bytes were read to get this far.
        last: whether the document ends with it.
    """

    text: str
    bytes_read: int
    last: bool = True


def read_documents(source: Source) -> Iterator[DocumentPart]:
    """The documents in the order of the source's files, and of the lines of a JSON-lines file.

    Line ends stay as they are; a byte order mark at a file's start is dropped. Blank lines of a JSON-lines
    file are no documents. A file that is one JSON array is read element by element. Of a text file there is 1 MiB in
    memory at a time, of others one line or element.

    Raises:
        DstrainError: with the file, or the file and the line, of what can't be read as text.
    """
    before = 0
    for file in source.files:
        try:
            if file.kind == "text":
                parts = _read_text(file, source.max_document_bytes or LARGEST_FILE)
            else:
                parts = _read_json_lines(file, source.max_document_bytes or LARGEST_LINE)
            for part in parts:
                yield replace(part, bytes_read=before + part.bytes_read)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DstrainError(
                f"incomplete or damaged gzip file: {error}",
                hint="copy it again; `gzip -t` checks it",
                where=file.path,
            ) from error
        except OSError as error:
            raise DstrainError(f"can't be read: {error.strerror or error}", where=file.path) from error
        before += file.size


def _read_text(file: SourceFile, limit: int) -> Iterator[DocumentPart]:
    """The parts of a text file, read block by block."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    read, lines = 0, 1
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
                raise not_utf8(error, file.path, lines) from None
            read += len(block)
            lines += block.count(b"\n")
            yield DocumentPart(text, read, last=not following)
            if not following:
                return
            block = following


def _read_json_lines(file: SourceFile, limit: int) -> Iterator[DocumentPart]:
    with open(file.path, "rb") as raw:
        lines: IO[bytes] = gzip.GzipFile(fileobj=raw) if file.path.lower().endswith(".gz") else raw  # type: ignore[assignment]
        plain_bytes, begun = 0, False
        for number, line in enumerate(iter(lambda: lines.readline(limit + 1), b""), start=1):
            where = f"{file.path}:{number}"
            plain_bytes += len(line)
            if number == 1:
                refuse_other_kinds(line, file.path)
                line = line.removeprefix(_BYTE_ORDER_MARK)
            if not begun and line.lstrip().startswith(b"["):
                for value, at in read_array(line, lines, file.path, number, limit):
                    yield DocumentPart(_text_in(value, "element", f"{file.path}:{at}"), raw.tell())
                return
            begun = begun or bool(line.strip())
            if len(line) > limit:
                raise DstrainError(
                    f"this line has more than {limit:,} bytes",
                    hint=f"set {_LIMIT_KEY} higher, or divide the document; a packed file may hold far more than its"
                    " size",
                    where=where,
                )
            if line.strip():
                # In a packed file it is the packed bytes that add up to the file's size.
                yield DocumentPart(_text_of(line, number, where), plain_bytes if lines is raw else raw.tell())


def _text_of(line: bytes, number: int, where: str) -> str:
    """The text field of one JSON line."""
    try:
        # Numbers of any length: none of them is the text.
        value: Any = json.loads(
            _decode(line, where.removesuffix(f":{number}"), first_line=number), parse_int=float
        )
    except json.JSONDecodeError as error:
        raise DstrainError(
            f"this line is not JSON: {error.msg} at column {error.colno}",
            hint=_LINE,
            where=where,
        ) from None
    except RecursionError:
        raise DstrainError("this line's JSON is nested too deeply to be read", where=where) from None
    return _text_in(value, "line", where)


def _text_in(value: Any, what: str, where: str) -> str:
    """The text field of an object; ``what``: of the file it is."""
    hint = _LINE.replace("line", what)
    if not isinstance(value, dict):
        raise DstrainError(
            f"this {what} holds {_name(value)}, not an object",
            hint=hint,
            where=where,
        )
    if TEXT_FIELD not in value:
        keys = ", ".join(repr(key) for key in list(value)[:12]) or "none"
        raise DstrainError(
            f"this {what} has no field {TEXT_FIELD!r}; its fields are {keys}", hint=hint, where=where
        )
    text = value[TEXT_FIELD]
    if not isinstance(text, str):
        keys = ", ".join(repr(key) for key in list(value)[:12])
        raise DstrainError(
            f"the field {TEXT_FIELD!r} holds {_name(text)}, not a string (fields: {keys})",
            hint=hint,
            where=where,
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        escape = f"\\u{ord(text[error.start]):04x}"
        raise DstrainError(
            f"character {error.start} is half a surrogate pair ({escape}), which UTF-8 can't encode",
            where=where,
        ) from None
    return text


def _decode(content: bytes, path: str, *, first_line: int) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8(error, path, first_line) from None


def _name(value: Any) -> str:
    names = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "an array",
        dict: "an object",
    }
    return "null" if value is None else names[type(value)]
