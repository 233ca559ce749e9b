"""To the disk itself, so that a rename can't survive a power cut that the content did not."""

from __future__ import annotations

import os
from pathlib import Path


def flush(path: Path) -> None:
    """Bring a file's bytes, or a folder's own entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
