"""What lies in a folder: counted by kind, and what makes text of the kinds that are not read."""

from __future__ import annotations

import os
import stat

from dstrain.files import kind_of
from dstrain.formatting import format_bytes

# fmt: off
_NO_TEXT = frozenset({
    ".png", ".jpg", ".jpeg", ".gif", ".bmp", ".ico", ".svg", ".webp", ".tif", ".tiff", ".psd", ".mp3", ".mp4", ".wav",
    ".ogg", ".flac", ".avi", ".mov", ".mkv", ".webm", ".ttf", ".otf", ".woff", ".woff2", ".eot", ".o", ".so", ".a",
    ".dll", ".exe", ".lib", ".class", ".jar", ".pyc", ".pyo", ".pyd", ".whl", ".wasm", ".map", ".lock", ".mo",
})
# fmt: on
"""What lies beside text without holding any: pictures, sound, fonts, what compilers make."""
_PACKED = (".gz", ".zst", ".xz", ".bz2", ".lz4", ".zip", ".tar", ".tgz", ".7z", ".rar")
_WAYS_OUT: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        (".orc", ".avro", ".xlsx"),
        "write its text as JSON Lines (.jsonl) or parquet, for example with pandas: read_orc(FILE).to_parquet(FILE)",
    ),
    (
        (".json",),
        "if each line is an object, name it .jsonl, or name the file itself; of one array: jq -c '.[]'",
    ),
    (_PACKED, "decompress it (of compressed files only .jsonl.gz and .jsonl.zst are read)"),
)
_KINDS_SHOWN = 6


class Kinds:
    """Files by kind: their suffix, or else their name.

    As a string: kinds with their number and size, the largest first: ``12 .parquet (3.1 GB), 1 .bin (12 kB)``.
    """

    def __init__(self) -> None:
        self._sizes: dict[str, list[int]] = {}

    def add(self, kind: str, size: int) -> None:
        """Count one file of so many bytes."""
        self._sizes.setdefault(kind, []).append(size)

    def __str__(self) -> str:
        by_size = sorted(self._sizes.items(), key=lambda item: (-sum(item[1]), item[0]))
        shown = [
            f"{len(sizes):,} {kind} ({format_bytes(sum(sizes))})" if kind.startswith(".") else kind
            for kind, sizes in by_size[:_KINDS_SHOWN]
        ]
        rest = sum(len(sizes) for _, sizes in by_size[_KINDS_SHOWN:])
        return ", ".join([*shown, *([f"{rest:,} other files"] if rest else [])])

    @property
    def unread_bytes(self) -> int:
        """Bytes of the kinds that may hold text."""
        return sum(sum(sizes) for kind, sizes in self._sizes.items() if kind not in _NO_TEXT)

    def way_out(self) -> str:
        """What makes text of the largest kind that may hold some, with a mark for more to be said; empty: not known."""
        sizes = {kind: sum(sizes) for kind, sizes in self._sizes.items() if kind not in _NO_TEXT}
        largest = max(sizes, key=lambda kind: sizes[kind], default="")
        return next((f"{way}; " for suffixes, way in _WAYS_OUT if largest.endswith(suffixes)), "")


def kind_and_size(entry: os.DirEntry[str], relative: str) -> tuple[str, int]:
    """The kind of a file that is not read, or its name and what it is where it is no file; and its size in bytes."""
    try:
        status = entry.stat()
    except OSError:
        return f"{relative} (a broken link)", 0
    if not stat.S_ISREG(status.st_mode):
        return f"{relative} ({kind_of(status.st_mode)})", 0
    stem, suffix = os.path.splitext(entry.name.lower())
    if suffix in _PACKED:
        suffix = os.path.splitext(stem)[1] + suffix
    return suffix or relative, status.st_size
