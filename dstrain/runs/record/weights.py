"""Identifies the pretrained weights that a run starts from, without reading all of them."""

from __future__ import annotations

import hashlib
from pathlib import Path

_FILES = ("*.safetensors", "*.bin")
_BLOCK = 2**16  # bytes that are read
_STRIDE = 2**20  # of so many; all of a file that has no more than _WHOLE
_WHOLE = 2**26


def weights_fingerprint(folder: Path) -> str:
    """A hash of the weight files' names, sizes and bytes.

    Of large files one block of 64 KiB in each MiB counts, and the last: training changes every tensor, so that other
    weights differ there, but a change by hand in between is not seen.

    Raises:
        OSError: a file can't be read.
    """
    digest = hashlib.sha256()
    for path in sorted(path for pattern in _FILES for path in folder.glob(pattern)):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        starts = (
            [*range(0, size, _STRIDE), max(0, size - _BLOCK)] if size > _WHOLE else range(0, size, _BLOCK)
        )
        with path.open("rb") as file:
            for start in starts:
                file.seek(start)
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()[:16]
