"""Tells what a file is by its content, whatever it is called: UTF-8 text, or what makes UTF-8 text of it."""

from __future__ import annotations

from dstrain.errors import DstrainError
from dstrain.text_encoding import way_to_utf8

_COMPRESSED = "; of compressed files only .jsonl.gz and .jsonl.zst are read"
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
    (b"PAR1", "this file is parquet", "let its name end with .parquet"),
    (b"ARROW1", "this file is Arrow's", "let its name end with .arrow"),
    (b"\x04\x22\x4d\x18", "this file is compressed (lz4)", f"decompress it: lz4 -d FILE{_COMPRESSED}"),
    (b"\x1f\x9d", "this file is compressed (compress)", f"decompress it: uncompress FILE{_COMPRESSED}"),
    (b"7z\xbc\xaf\x27\x1c", "this file is a 7z archive", "unpack it: 7z x FILE"),
    (b"Rar!\x1a\x07", "this file is a rar archive", "unpack it: unrar x FILE"),
    (b"%PDF-", "this file is PDF", "take its text out: pdftotext FILE"),
    (
        b"SQLite format 3\0",
        "this file is an SQLite database",
        "write its text as JSON Lines, or name code of your own",
    ),
    (b"\x89HDF\r\n", "this file is HDF5", "write its text as JSON Lines, or name code of your own"),
    (
        b"\x93NUMPY",
        "this file holds numpy's arrays",
        "write its text as JSON Lines, or name code of your own",
    ),
    (b"Obj\x01", "this file is Avro", "write its text as JSON Lines, or name code of your own"),
    (
        b"version https://git-lfs.github.com/",
        "this is a pointer of git LFS, not the file itself",
        "git lfs pull",
    ),
)
"""How files begin that are no UTF-8 text, whatever they are called; what they are, and what makes text of them."""

_LOOKED_AT = 4096  # bytes
_ZEROS: dict[tuple[bool, ...], str] = {
    (False, True, False, True): "UTF-16LE",
    (True, False, True, False): "UTF-16BE",
    (False, True, True, True): "UTF-32LE",
    (True, True, True, False): "UTF-32BE",
}


def refuse_other_kinds(content: bytes, where: str) -> None:
    """Refuse what does not begin as UTF-8 text does. Raises DstrainError."""
    for mark, what, hint in _OTHER_KINDS:
        if content.startswith(mark):
            raise DstrainError(what, hint=hint, where=where)
    if content[257:262] == b"ustar":
        raise DstrainError("this file is a tar archive", hint="unpack it: tar xf FILE", where=where)
    if encoding := _unmarked_encoding(content[:_LOOKED_AT]):
        raise DstrainError(
            f"this text is {encoding[:6]}, not UTF-8", hint=f"iconv -f {encoding} -t UTF-8", where=where
        )


def _unmarked_encoding(content: bytes) -> str | None:
    """UTF-16 or UTF-32 without a mark: most letters have zeros at the same places."""
    if len(content) < 4 or b"\0" not in content:
        return None
    shares = [content[place::4].count(0) / len(content[place::4]) for place in range(4)]
    zeros = tuple(share > 0.5 for share in shares)
    few = all(share < 0.2 for share, zero in zip(shares, zeros, strict=True) if not zero)
    return _ZEROS.get(zeros) if few else None


def not_utf8(
    error: UnicodeDecodeError, path: str, first_line: int, *, more_is_utf8: bool = False
) -> DstrainError:
    """The error for a byte that is none of UTF-8.

    Args:
        first_line: the number of the line that the bytes begin on.
        more_is_utf8: as of `way_to_utf8`.
    """
    line = first_line + error.object.count(b"\n", 0, error.start)
    return DstrainError(
        f"not UTF-8: byte 0x{error.object[error.start]:02x} ({error.reason})",
        hint=way_to_utf8(error.object, error.start, more_is_utf8=more_is_utf8),
        where=f"{path}:{line}",
    )
