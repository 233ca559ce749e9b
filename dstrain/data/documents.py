"""Reads the documents of a corpus, with precise errors for what is not text."""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import IO, Any

from dstrain.data.sources import Source, SourceFile
from dstrain.errors import DstrainError

TEXT_FIELD = "text"
_LINE = 'each line is one object: {"text": "..."}'
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_COMPRESSED = "; of compressed files only .jsonl.gz is read"
_OTHER_KINDS = (
    (b"\xff\xfe\0\0", "this text is UTF-32, not UTF-8", "iconv -f UTF-32 -t UTF-8"),
    (b"\0\0\xfe\xff", "this text is UTF-32, not UTF-8", "iconv -f UTF-32 -t UTF-8"),
    (b"\xff\xfe", "this text is UTF-16, not UTF-8", "iconv -f UTF-16 -t UTF-8"),
    (b"\xfe\xff", "this text is UTF-16, not UTF-8", "iconv -f UTF-16 -t UTF-8"),
    (b'{\0"\0', "this text is UTF-16, not UTF-8", "iconv -f UTF-16LE -t UTF-8"),
    (b'\0{\0"', "this text is UTF-16, not UTF-8", "iconv -f UTF-16BE -t UTF-8"),
    (b"\x1f\x8b", "this file is compressed (gzip)", f"decompress it: gunzip FILE{_COMPRESSED}"),
    (b"\x28\xb5\x2f\xfd", "this file is compressed (zstd)", f"decompress it: zstd -d FILE{_COMPRESSED}"),
    (b"\xfd7zXZ\0", "this file is compressed (xz)", f"decompress it: xz -d FILE{_COMPRESSED}"),
    (b"BZh", "this file is compressed (bzip2)", f"decompress it: bzip2 -d FILE{_COMPRESSED}"),
    (b"PK\x03\x04", "this file is a zip archive", "unpack it: unzip FILE"),
    (
        b"PAR1",
        "this file is parquet",
        "write its text as JSON Lines: pandas' to_json(orient='records', lines=True)",
    ),
    (b"ARROW1", "this file is Arrow's", "write its text as JSON Lines: datasets' to_json"),
)
"""How files begin that are no UTF-8 text, whatever they are called; what they are, and what makes text of them."""


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
    file are no documents. Of a text file there is 1 MiB in memory at a time, of a JSON-lines file one line.

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
        _refuse_other_kinds(block, file.path)
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
                raise _not_utf8(error, file.path, lines) from None
            read += len(block)
            lines += block.count(b"\n")
            yield DocumentPart(text, read, last=not following)
            if not following:
                return
            block = following


def _refuse_other_kinds(content: bytes, where: str) -> None:
    for mark, what, hint in _OTHER_KINDS:
        if content.startswith(mark):
            raise DstrainError(what, hint=hint, where=where)


def _read_json_lines(file: SourceFile, limit: int) -> Iterator[DocumentPart]:
    with open(file.path, "rb") as raw:
        lines: IO[bytes] = gzip.GzipFile(fileobj=raw) if file.path.lower().endswith(".gz") else raw  # type: ignore[assignment]
        plain_bytes = 0
        for number, line in enumerate(iter(lambda: lines.readline(limit + 1), b""), start=1):
            where = f"{file.path}:{number}"
            plain_bytes += len(line)
            if len(line) > limit:
                raise DstrainError(
                    f"this line has more than {limit:,} bytes",
                    hint=f"set {_LIMIT_KEY} higher, or divide the document; a packed file may hold far more than its"
                    " size",
                    where=where,
                )
            if number == 1:
                _refuse_other_kinds(line, file.path)
                line = line.removeprefix(_BYTE_ORDER_MARK)
                if line.lstrip().startswith(b"["):
                    raise DstrainError(
                        "this file is one JSON array, and not an object on each line",
                        hint="convert it: jq -c '.[]' FILE > FILE.jsonl",
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
    if not isinstance(value, dict):
        raise DstrainError(
            f"this line holds {_name(value)}, not an object",
            hint=_LINE,
            where=where,
        )
    if TEXT_FIELD not in value:
        keys = ", ".join(repr(key) for key in list(value)[:12]) or "none"
        raise DstrainError(
            f"this line has no field {TEXT_FIELD!r}; its fields are {keys}", hint=_LINE, where=where
        )
    text = value[TEXT_FIELD]
    if not isinstance(text, str):
        keys = ", ".join(repr(key) for key in list(value)[:12])
        raise DstrainError(
            f"the field {TEXT_FIELD!r} holds {_name(text)}, not a string (fields: {keys})",
            hint=_LINE,
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
        raise _not_utf8(error, path, first_line) from None


def _not_utf8(error: UnicodeDecodeError, path: str, first_line: int) -> DstrainError:
    line = first_line + error.object.count(b"\n", 0, error.start)
    return DstrainError(
        f"not UTF-8: byte 0x{error.object[error.start]:02x} ({error.reason})",
        hint="save it as UTF-8, for example: iconv -f ISO-8859-1 -t UTF-8",
        where=f"{path}:{line}",
    )


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
