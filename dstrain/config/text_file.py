"""Reads small text files from the user, with precise errors for files that are not text."""

from __future__ import annotations

import codecs
import difflib
import os
import stat
from pathlib import Path

from dstrain.addresses import refuse_address
from dstrain.errors import DstrainError
from dstrain.text_encoding import way_to_utf8

LARGEST = 1_000_000
"""Bytes. What a person writes is far less, and reading more than this as YAML would take minutes."""

_MOST_SHOWN = 300  # characters of a path
_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_KINDS = (
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a disk"),
    (stat.S_ISSOCK, "a socket"),
)


def read_text(path: Path, *, where: str) -> str:
    """The text of a file, without a byte order mark and with lines that end as here. Never waits: a pipe is not read.

    Args:
        where: what names the file, for messages: a flag, or a line of another file.

    Raises:
        DstrainError: there is no such file, it is no file, may not be read, is too large, or is not UTF-8 text.
    """
    name = shown(path)
    try:
        # Looked at before it is opened, which a device may notice; and then again: it may have been replaced.
        _refuse_other_kinds(path.stat(), name, where)
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            _refuse_other_kinds(os.fstat(file.fileno()), name, where)
            content = file.read(LARGEST)
    except FileNotFoundError:
        refuse_address(os.fspath(path), where)
        raise DstrainError(f"there is no file {name}", where=where, hint=_near(path)) from None
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = getattr(error, "strerror", None) or str(error)
        raise DstrainError(
            f"can't read {name}: {reason}", where=where, hint="check the path and its permissions"
        ) from None
    return _decoded(content, name)


def shown(path: str | os.PathLike[str]) -> str:
    """A path for a message: as it is written, unless that would not be one line of plain text."""
    text = os.fspath(path)
    if len(text) > _MOST_SHOWN:
        text = f"{text[:_MOST_SHOWN]}..."
    return text if text.isprintable() else ascii(text)


def _refuse_other_kinds(status: os.stat_result, name: str, where: str) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise DstrainError(f"{name} is a folder, not a file", where=where, hint="name a file in it")
    for is_kind, kind in _KINDS:
        if is_kind(status.st_mode):
            raise DstrainError(
                f"{name} is {kind}, not a file", where=where, hint="write the text to a file, and name that"
            )
    if status.st_size > LARGEST:
        raise DstrainError(
            f"{name} has {status.st_size / 1e6:,.0f} MB, and the limit is {LARGEST / 1e6:.0f}",
            where=where,
            hint="check that this is the right file",
        )


def _near(path: Path) -> str:
    """The file beside it whose name is almost the same."""
    try:
        beside = os.listdir(path.parent)
    except OSError:
        return "check the path"
    near = difflib.get_close_matches(path.name, beside[:1000], n=1, cutoff=0.8)
    return f"did you mean {shown(path.parent / near[0])}?" if near else "check the path"


def _decoded(content: bytes, name: str) -> str:
    for mark, encoding in _MARKS:
        if content.startswith(mark):
            raise DstrainError(
                f"this is {encoding}, not UTF-8 text",
                where=f"{name}:1",
                hint=f"convert it: iconv -f {encoding} -t UTF-8",
            )
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DstrainError(
            f"not UTF-8 text: byte 0x{content[error.start]:02x} ({error.reason})",
            where=f"{name}:{_line(content, error.start)}",
            hint=way_to_utf8(content, error.start),
        ) from None
    if "\0" in text:
        raise DstrainError(
            "binary file, not text: it contains a zero byte",
            where=f"{name}:{_line(content, content.index(0))}",
            hint="check that this is the right file",
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _line(content: bytes, position: int) -> int:
    return content.count(b"\n", 0, position) + 1
