"""The ring of a stream: a folder on a host in which one process writes segments of rows, and the ranks read them.

``control`` holds two numbers for each reader: the first segment that it still needs, and the newest that it has asked
for. The writer keeps a few segments ahead of what was asked for, and removes what nobody needs. It holds a lock on
``NAME.lock``, beside the folder, for as long as it lives; what it fails with stands in ``error.json``.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dstrain.data.streaming.making import MadeRows
from dstrain.data.streaming.segments import Segment, write_segment
from dstrain.errors import DstrainError
from dstrain.shared_caches import make_folder, open_lock
from dstrain.strict_json import to_json

AHEAD = 4
"""Segments that are written ahead of what was asked for."""
_SHORTEST, _LONGEST = 0.001, 0.05
"""Seconds between two looks at a file that is waited for."""
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


@dataclass(frozen=True)
class RingFolder:
    """The names of a ring's files. The folder's own ends with ``.part``, as of all that killed processes leave in
    caches, so `dstrain.shared_caches.clear_leftovers` removes it."""

    path: Path

    @classmethod
    def below(cls, folder: Path, name: str) -> RingFolder:
        """The ring of that name, which has no dot, in a folder of a cache."""
        return cls(folder / f"{name}.ring.part")

    @property
    def lock(self) -> Path:
        return self.path.with_name(self.path.name.partition(".")[0] + ".lock")

    @property
    def request(self) -> Path:
        return self.path / "request.json"

    @property
    def control(self) -> Path:
        return self.path / "control"

    @property
    def files(self) -> Path:
        """The folder of files from the hub while they are read."""
        return self.path / "files"

    @property
    def error(self) -> Path:
        return self.path / "error.json"

    def note_reading(self, place: str) -> None:
        """Let the readers know which file is read now."""
        aside = self.path / "reading.new"
        aside.write_text(place, encoding="utf-8", errors="surrogateescape")
        aside.replace(self.path / "reading")

    def reading(self) -> str:
        """The file that is read now; empty where none is known."""
        try:
            return (self.path / "reading").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""

    def segment(self, number: int) -> Path:
        return self.path / f"segment-{number}"

    def make(self) -> None:
        """Make the folder for this user alone. Raises OSError."""
        make_folder(self.path.parent)
        self.path.mkdir(mode=0o700)

    def fail(self, error: DstrainError) -> None:
        """Let the readers know why no more segments follow those that are there. The first reason stays."""
        if not self.error.exists():
            words = {name: getattr(error, name) for name in ("message", "hint", "where", "exit_code")}
            aside = self.error.with_suffix(".new")
            aside.write_text(to_json(words), encoding="utf-8")
            aside.replace(self.error)

    def failure(self) -> DstrainError:
        """Why no more segments follow."""
        try:
            words = json.loads(self.error.read_text(encoding="utf-8"))
        except OSError:
            if not self.path.exists():
                return DstrainError(
                    "the rank that makes the rows of the data has ended",
                    hint="see what it says in its log",
                    exit_code=1,
                )
            return DstrainError(
                "the process that makes the rows of the data has been killed",
                hint="what is killed has often run out of memory (see dmesg); resume the run",
                exit_code=1,
            )
        return DstrainError(words.pop("message"), **words)

    def remove(self) -> None:
        """Remove all of it, but for what it has failed with: who still asks for rows is told. Who has mapped a segment
        keeps that."""
        if not self.error.exists():
            shutil.rmtree(self.path, ignore_errors=True)
        else:
            shutil.rmtree(self.files, ignore_errors=True)
            for path in self.path.iterdir():
                if path != self.error and not path.is_dir():
                    path.unlink(missing_ok=True)
        self.lock.unlink(missing_ok=True)


class RingWriter:
    """The end that writes.

    Args:
        readers: how many read.
        ahead: segments that are written ahead of what was asked for.
    """

    def __init__(self, folder: RingFolder, readers: int, ahead: int = AHEAD) -> None:
        self._folder = folder
        self._ahead = ahead
        self._removed = 0
        self.number = 0
        self._lock = open_lock(folder.lock)  # for as long as this process lives
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        # The readers look for this file, so it is there when the lock is taken.
        aside = folder.control.with_suffix(".new")
        aside.write_bytes(np.full((readers, 2), [0, -1], np.int64).tobytes())
        aside.replace(folder.control)
        self._control = np.memmap(folder.control, np.int64, mode="r", shape=(readers, 2))

    def write(self, made: MadeRows, dtype: np.dtype, check: str = "") -> None:
        """Write a segment when it is not too far ahead.

        Args:
            dtype: of the tokens.
            check: the hash that its rows had when they were made before.

        Raises:
            DstrainError: they have another one now; nobody gets to see them.
        """
        pause = _SHORTEST
        while self.number > int(self._control[:, 1].max()) + self._ahead:
            self._remove_unneeded()
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST)
        self._remove_unneeded()
        path = self._folder.segment(self.number)
        aside = path.with_suffix(".new")
        found = write_segment(aside, made, dtype)
        if check and found != check:
            raise DstrainError(
                "the rows differ from those that were made before the checkpoint",
                hint="a file has changed, or the tokenizer's library: go back to what was there, or start a new run",
            )
        aside.replace(path)
        self.number += 1

    def _remove_unneeded(self) -> None:
        needed = min(int(self._control[:, 0].min()), self.number)
        while self._removed < needed:
            self._folder.segment(self._removed).unlink(missing_ok=True)
            self._removed += 1


class RingReader:
    """One of the ends that read.

    Args:
        reader: its number among those of this host.
    """

    def __init__(self, folder: RingFolder, reader: int) -> None:
        self._folder = folder
        self._reader = reader
        self._control: np.ndarray | None = None
        self._lock: int | None = None

    def segment(self, number: int, writer_ended: bool = False) -> Segment | None:
        """The segment of that number; None if it is not there yet. Each is asked for in its turn.

        Args:
            writer_ended: the writer is gone, as the caller knows.

        Raises:
            DstrainError: what the writer has failed with, or that it is gone.
        """
        over = writer_ended or self._folder.error.exists() or self._is_over()
        if self._control is None and self._folder.control.exists():
            self._control = np.memmap(self._folder.control, np.int64, mode="r+").reshape(-1, 2)
        if self._control is not None and self._control[self._reader, 1] < number:
            self._control[self._reader, 1] = number
        # What was written before the end is there, now that the end was seen.
        with suppress(FileNotFoundError):
            return Segment.open(self._folder.segment(number))
        if over:
            raise self._folder.failure()
        return None

    def release(self, below: int) -> None:
        """Say that segments with smaller numbers are not asked for any more."""
        if self._control is not None and self._control[self._reader, 0] < below:
            self._control[self._reader, 0] = below

    def _is_over(self) -> bool:
        """Whether nobody holds the writer's lock any more, or the ring is gone. False where that can't be told."""
        if not self._folder.path.exists():
            return True
        if self._control is None:
            return False  # the lock is taken before this file is there
        try:
            if self._lock is None:
                self._lock = os.open(self._folder.lock, os.O_RDWR | os.O_CLOEXEC)
            fcntl.flock(self._lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            fcntl.flock(self._lock, fcntl.LOCK_UN)
            return True
        except OSError as error:
            return error.errno == errno.ENOENT

    def close(self) -> None:
        """Ask for nothing more."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
