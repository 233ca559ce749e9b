"""Holds a checkpoint while it is read, so that a training that goes on does not remove it meanwhile."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dstrain.runs.checkpoint.manifest import MANIFEST


@contextmanager
def held(checkpoint: Path) -> Iterator[None]:
    """While a training does not remove this checkpoint; where the file system has no locks, it may.

    Raises:
        FileNotFoundError: it has been removed.
    """
    manifest = checkpoint / MANIFEST
    descriptor = os.open(manifest, os.O_RDONLY)
    try:
        with suppress(OSError):  # no locks here, or it is being removed: the latter is seen next
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(descriptor), manifest.stat()):
            raise FileNotFoundError(f"{checkpoint} has been replaced")
        yield
    finally:
        os.close(descriptor)


@contextmanager
def unless_held(checkpoint: Path) -> Iterator[bool]:
    """Whether nobody holds it; nobody can until this ends."""
    try:
        descriptor = os.open(
            checkpoint / MANIFEST, os.O_RDWR
        )  # NFS wants to write what is locked for one alone
    except OSError:
        yield True
        return
    try:
        free = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            free = False
        except OSError:  # no locks here
            pass
        yield free
    finally:
        os.close(descriptor)
