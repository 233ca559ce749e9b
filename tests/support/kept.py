"""Folders that outlive a run of the tests, for what takes minutes to make and depends on what their key says.

They lie in ``DSTRAIN_TEST_CACHE``, or in ``dstrain-tests`` in the user's cache folder; ``DSTRAIN_TEST_CACHE=`` (empty)
keeps nothing. One run of the tests at a time has them: another one that comes meanwhile makes its own.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path


def key_of(*parts: str | bytes) -> str:
    """The name of a folder whose content depends on these texts and on nothing else."""
    found = sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        found.update(len(data).to_bytes(8, "big") + data)
    return found.hexdigest()[:20]


@contextmanager
def kept_folder(kind: str, key: str, otherwise: Path) -> Iterator[tuple[Path, bool]]:
    """A folder for this key, with what the last run of the tests has left there; those with other keys are deleted.

    Args:
        kind: what is in it. One run of the tests at a time has the folders of a kind.
        otherwise: a folder to make, and to delete in the end, where nothing is to be kept or another run has them.

    Yields:
        the folder, and whether it is kept.
    """
    root = _root()
    lock = _lock(root / f"{kind}.lock") if root else None
    if root is None or lock is None:
        otherwise.mkdir(parents=True)
        try:
            yield otherwise, False
        finally:
            shutil.rmtree(otherwise)
        return
    try:
        folder = root / kind / key
        folder.mkdir(parents=True, exist_ok=True)
        for other in folder.parent.iterdir():
            if other != folder:
                shutil.rmtree(other)
        yield folder, True
    finally:
        os.close(lock)


def _root() -> Path | None:
    chosen = os.environ.get("DSTRAIN_TEST_CACHE")
    if chosen is not None:
        return Path(chosen).absolute() if chosen else None
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "dstrain-tests"


def _lock(path: Path) -> int | None:
    """Hold this file until the process ends or closes what is returned; None where another one holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle
