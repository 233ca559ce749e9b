"""Flushes files to disk, and finds out why a write failed."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from dstrain.files import flush

# As much as shows whether a disk takes anything at all.
_PROBE_BYTES = 1024 * 1024


def flush_folders(folder: Path) -> None:
    """Bring the folder's own entries to the disk, and those of the folders below it."""
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            flush(path)


def why_not_written(error: Exception, folder: Path) -> str | None:
    """The disk's own reason behind an error of writing below ``folder``; call it before anything is removed.

    None for an error that has nothing to do with writing: the connection to a rank that failed, for one.
    """
    if isinstance(error, OSError):
        return error.strerror or str(error)
    refusal = _refusal_of_disk(folder) if folder.is_dir() else None
    return refusal or (str(error).splitlines()[0] if _is_of_torch_writer(error) else None)


def _refusal_of_disk(folder: Path) -> str | None:
    """Why the disk takes no more, found by trying: torch's writer says only that it failed."""
    probe = folder / f"probe-{os.getpid()}-{threading.get_ident()}"
    try:
        with probe.open("wb") as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror
    finally:
        probe.unlink(missing_ok=True)
    return None


def _is_of_torch_writer(error: Exception) -> bool:
    """torch.save's C++ writer raises a RuntimeError for whatever the disk says."""
    return isinstance(error, RuntimeError) and any(
        word in str(error)
        for word in ("PytorchStreamWriter", "inline_container", "unexpected pos", "file write")
    )
