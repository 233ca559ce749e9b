"""Atomic and durable file writes."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any


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


def write_private(path: Path, content: str) -> None:
    """The same with mode 0600 from the first byte on, whatever lay at ``path``: a link is replaced, not followed.

    Raises:
        OSError: it can't be written; ``path`` is a folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    aside.unlink(missing_ok=True)
    try:
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(content)
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def write_json(path: Path, record: Any) -> None:
    """Write ``record`` as indented JSON, atomically."""
    write_atomically(path, json.dumps(record, indent=2) + "\n")
