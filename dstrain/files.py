"""Atomic and durable file writes."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

from dstrain.strict_json import to_json


def flush(path: Path) -> None:
    """Bring a file's bytes, or a folder's own entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write ``content`` beside ``path`` and rename it into place; text as UTF-8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")  # containers count alike
    try:
        aside.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def write_json(path: Path, record: Any) -> None:
    """Write ``record`` as indented, strict JSON, atomically."""
    write_atomically(path, to_json(record, indent=2) + "\n")
