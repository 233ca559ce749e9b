"""Opens compressed JSON-lines files. A file that ends too early is told with the line that it ends in."""

from __future__ import annotations

import gzip
import io
from typing import IO, Any, cast

from dstrain.errors import DstrainError

COMPRESSED_SUFFIXES = (".gz", ".zst")


def open_lines(raw: IO[bytes], path: str) -> IO[bytes]:
    """What a file holds, by its suffix: unpacked where it ends with one of `COMPRESSED_SUFFIXES`, else as it is.

    What is read from it may raise gzip's errors, or DstrainError for what is no zstd.
    """
    name = path.lower()
    if name.endswith(".gz"):
        return cast(IO[bytes], gzip.GzipFile(fileobj=raw))
    if name.endswith(".zst"):
        return cast(IO[bytes], io.BufferedReader(_Zstd(raw, path), 2**16))
    return raw


class _Zstd(io.RawIOBase):
    """Unpacks zstd, one or several frames behind each other."""

    def __init__(self, raw: IO[bytes], path: str) -> None:
        super().__init__()
        self._path = path
        self._line = 1
        self._stream = _decompressed(raw)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            read = self._stream.read(len(buffer))
        except Exception as error:  # OSError, EOFError, or ZstdError of Python's own module
            if getattr(error, "errno", None):  # the disk's
                raise
            raise DstrainError(
                f"incomplete or damaged zstd file, from this line on: {error}",
                hint="copy it again; `zstd -t` checks it",
                where=f"{self._path}:{self._line}",
            ) from error
        self._line += read.count(b"\n")
        buffer[: len(read)] = read
        return len(read)


def _decompressed(raw: IO[bytes]) -> Any:
    """Python's own reader from 3.14 on, else Arrow's."""
    try:
        from compression import zstd
    except ImportError:
        import pyarrow

        return pyarrow.CompressedInputStream(raw, "zstd")
    return zstd.ZstdFile(raw)
