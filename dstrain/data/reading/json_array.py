"""Reads a file that is one JSON array, element by element."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator
from typing import IO, Any

from dstrain.data.reading.encodings import not_utf8
from dstrain.errors import DstrainError

_BLOCK = 2**16
_SPACES = re.compile(r"[ \t\r\n]*")
_LONGEST_TOKEN = 16
"""Characters of an escape or a word like ``false``: an error this near to the end may be of one that is cut."""


def read_array(
    begin: bytes,
    stream: IO[bytes],
    path: str,
    line: int,
    limit: int,
    parse_int: Callable[[str], Any] = float,
) -> Iterator[tuple[Any, int]]:
    """The elements of a JSON array, each with the number of the line that it begins on.

    Args:
        begin: what was read of the stream, from the line on that opens the array: the one numbered ``line``.
        limit: the largest element, in bytes.
        parse_int: of the digits of a whole number, which may be many.

    Raises:
        DstrainError: with the line of what is not JSON, too large, or missing.
    """
    text = _Text(begin, stream, path, line, parse_int)
    text.skip("[")
    while text.next() != "]":
        at = text.line
        yield text.value(limit), at
        if text.next() == ",":
            text.skip(",")
            if text.next() == "]":
                raise text.error("a comma before the end of the array")
        elif text.next() != "]":
            raise text.error(
                "',' or ']' is missing" if text.next() else "the array has no end: the file may be cut off"
            )
    text.skip("]")
    if text.next():
        raise text.error("more text behind the end of the array")


class _Text:
    """A part of the stream's text, and a place in it."""

    def __init__(
        self, begin: bytes, stream: IO[bytes], path: str, line: int, parse_int: Callable[[str], Any]
    ) -> None:
        self._stream = stream
        self._path = path
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._json = json.JSONDecoder(parse_int=parse_int)
        self._text, self._place, self._ended = "", 0, False
        self.line = line
        self._add(begin)

    def next(self) -> str:
        """The next character that is no space, where the place is then; empty at the end."""
        while True:
            found = _SPACES.match(self._text, self._place)
            assert found is not None
            self._move(found.end())
            if self._place < len(self._text):
                return self._text[self._place]
            if not self._read(_BLOCK):
                return ""

    def skip(self, character: str) -> None:
        """Go behind a character that comes next."""
        assert self.next() == character
        self._place += 1

    def value(self, limit: int) -> Any:
        """The value that begins at the place, and go behind it."""
        size = _BLOCK
        while True:
            try:
                found, end = self._json.raw_decode(self._text, self._place)
            except json.JSONDecodeError as error:
                cut = (
                    error.msg.startswith("Unterminated string")
                    or error.pos > len(self._text) - _LONGEST_TOKEN
                )
                if not cut or self._ended:
                    self._move(min(error.pos, len(self._text)))
                    raise self.error(f"this is not JSON: {error.msg}") from None
                end = len(self._text)
            except RecursionError:
                raise self.error("this element's JSON is nested too deeply to be read") from None
            else:
                if end - self._place <= limit:
                    self._move(end)
                    return found
            if end - self._place > limit:
                raise self.error(
                    f"this element has more than {limit:,} bytes",
                    "set max_document_bytes higher, or divide the document",
                )
            self._read(size)
            size *= 2

    def error(self, message: str, hint: str = "check it: python -m json.tool FILE") -> DstrainError:
        """With the line of the place."""
        return DstrainError(message, hint=hint, where=f"{self._path}:{self.line}")

    def _move(self, place: int) -> None:
        self.line += self._text.count("\n", self._place, place)
        self._place = place

    def _read(self, size: int) -> bool:
        """Whether there was more; what is behind the place is kept."""
        if self._ended:
            return False
        block = self._stream.read(size)
        self._text, self._place = self._text[self._place :], 0
        self._add(block)
        self._ended = not block
        return not self._ended

    def _add(self, block: bytes) -> None:
        try:
            self._text += self._decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise not_utf8(error, self._path, self.line + self._text.count("\n", self._place)) from None
