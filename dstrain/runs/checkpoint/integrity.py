"""Verifies the checksums of checkpoint files, divided among the ranks."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from dstrain.runs.checkpoint.manifest import FileRecord

_CHUNK = 4 * 1024 * 1024


def checksum(path: Path, *, from_disk: bool = False, on_bytes: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file's bytes, in hexadecimal digits.

    Args:
        from_disk: forget the system's copy in memory first, so that the disk itself is read. Only clean
            pages can be forgotten: call fsync before.
        on_bytes: told how many bytes were read, chunk by chunk.

    Raises:
        OSError: the file can't be read.
    """
    digest = hashlib.sha256()
    chunk = memoryview(bytearray(_CHUNK))
    with path.open("rb", buffering=0) as file:
        if from_disk and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while count := file.readinto(chunk):
            digest.update(chunk[:count])
            if on_bytes is not None:
                on_bytes(count)
    return digest.hexdigest()


def wrong_files(
    checkpoint: Path,
    files: Mapping[str, FileRecord],
    names: Iterable[str],
    *,
    on_bytes: Callable[[int], None] | None = None,
) -> dict[str, str]:
    """What is wrong with each of the named files, all of whose bytes are read; empty where nothing is.

    Files of an earlier manifest, which holds no checksums, are read and compared by size.
    """
    found = {}
    for name in names:
        path, record = checkpoint / name, files[name]
        try:
            if why := record.wrong_size(name, path.stat().st_size):
                found[name] = why
            elif checksum(path, on_bytes=on_bytes) != record.sha256 and record.sha256 is not None:
                found[name] = f"{name} does not match its checksum"
        except FileNotFoundError:
            found[name] = f"{name} is missing"
        except OSError as error:
            found[name] = f"{name} can't be read ({error.strerror})"
    return found


def share_out(sizes: Mapping[str, int], parts: int) -> list[list[str]]:
    """The files in ``parts`` shares of about as many bytes each; the same for the same arguments.

    The largest file goes to the smallest share, and so on.
    """
    shares: list[list[str]] = [[] for _ in range(parts)]
    filled = [0] * parts
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        least = filled.index(min(filled))
        shares[least].append(name)
        filled[least] += sizes[name]
    return shares
