"""Writes checkpoints in the background, where host memory has room for a copy: one thread per rank."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dstrain.engine.async_checkpoint import AsyncCheckpointStage
from dstrain.files import flush
from dstrain.runs.checkpoint.manifest import FileRecord, checksum
from dstrain.strict_json import to_json
from dstrain.train.checkpointing.checkpoint_folder import why_not_written

WORDS = "words"
"""The folder in a checkpoint that is being written where each rank leaves its word; removed before the manifest."""

PATIENCE = 3.0
"""Seconds that ranks which may be gone are waited for at least, when the training ends with an error."""

# How often rank 0 looks whether the words of the others have come, in seconds.
_LOOK_EVERY = 0.05


@dataclass(frozen=True)
class Failure:
    """Why a checkpoint could not be written. ``error`` is set where it is this rank's and no matter of the disk."""

    reason: str
    error: Exception | None = None


class BackgroundWriter:
    """One checkpoint while it is written. No thread speaks to another rank but through files.

    A rank writes its files, brings them to the disk, reads them back for their checksums, and leaves a word.
    Rank 0 then waits for the words of all and completes the checkpoint. Where a rank fails it removes what it
    wrote, so that the disk has room for its last words, and leaves its reason; rank 0 removes the rest.

    Args:
        aside: the folder that it is written into; there, with the folder of words in it.
        held: this rank's files that wait in memory.
        written: files that are there already and are this rank's to flush and read; paths inside ``aside``.
        rank, ranks: this rank, and how many there are.
        complete: makes a checkpoint of the folder, given size and checksum of every file. Called by rank 0 alone.
    """

    def __init__(
        self,
        aside: Path,
        *,
        held: AsyncCheckpointStage,
        written: Sequence[str],
        rank: int,
        ranks: int,
        complete: Callable[[Mapping[str, FileRecord]], None],
    ) -> None:
        self.failure: Failure | None = None
        self._aside = aside
        self._held = held
        self._written = list(written)
        self._rank = rank
        self._ranks = ranks
        self._complete = complete
        self._abandoned = threading.Event()
        self._part_ended = threading.Event()
        self._seconds = 0.0
        # A daemon: a rank that is told to end at once does not wait for its disk.
        self._thread = threading.Thread(target=self._run, name="checkpoint writer", daemon=True)
        self._thread.start()

    def wait_for_part(self) -> Failure | None:
        """Wait until this rank's own files lie on the disk, or have failed to."""
        self._part_ended.wait()
        return self.failure

    def wait(self) -> Failure | None:
        """Wait for all that this rank does: on rank 0, for the whole checkpoint and so for every rank's word."""
        self._thread.join()
        return self.failure

    def wait_without_others(self) -> None:
        """Wait where other ranks may be gone: rank 0 gives them as long as its own part took, or PATIENCE."""
        self._part_ended.wait()
        patience = max(PATIENCE, self._seconds)
        self._thread.join(patience)
        self._abandoned.set()
        self._thread.join(patience)

    def abandon(self) -> None:
        """Complete nothing any more, and remove what was written. All ranks' parts must have ended."""
        self._abandoned.set()
        self._thread.join()
        shutil.rmtree(self._aside, ignore_errors=True)

    def _run(self) -> None:
        # When a failure can be read, room for this rank's last words has been made: its reader may end the process.
        self.failure = self._end_part()
        self._part_ended.set()
        if self._rank == 0:
            self._end_whole()

    def _end_part(self) -> Failure | None:
        began = time.monotonic()
        own: list[Path] = []
        try:
            records = self._write_part(own)
            self._leave_word({"files": {name: asdict(record) for name, record in records.items()}})
            return None
        except Exception as error:
            failure = self._failure_of(error)
            self._held.drop()
            self._remove(own, failure)
            return failure
        finally:
            self._seconds = time.monotonic() - began

    def _end_whole(self) -> None:
        """Complete the checkpoint when all parts are there; where one is not, remove the rest."""
        try:
            files = self._words_of_all()
            if files is not None and self.failure is None:
                self._complete(files)
        except Exception as error:
            self.failure = self.failure or self._failure_of(error)
        if self.failure is not None:
            shutil.rmtree(self._aside, ignore_errors=True)

    def _write_part(self, own: list[Path]) -> dict[str, FileRecord]:
        """Notes each file in ``own`` before its first byte is written."""
        own += self._held.paths
        records = {}
        for path in self._held.write():
            records[path.relative_to(self._aside).as_posix()] = record(path)
        for name in self._written:
            own.append(self._aside / name)
            records[name] = record(self._aside / name)
        return records

    def _words_of_all(self) -> dict[str, FileRecord] | None:
        """The files of all ranks; notes a failure as soon as it is heard. None where nobody waits any more."""
        words = self._aside / WORDS
        files: dict[str, FileRecord] = {}
        heard: set[str] = set()
        while True:
            for path in words.glob("rank-*.json"):
                if path.name in heard:
                    continue
                heard.add(path.name)
                word = json.loads(path.read_text(encoding="utf-8"))
                if "failed" in word:
                    self.failure = self.failure or Failure(word["failed"])
                else:
                    files |= {name: FileRecord(**record) for name, record in word["files"].items()}
            if len(heard) == self._ranks:
                return files
            if self._abandoned.wait(_LOOK_EVERY):
                return None
            if not words.is_dir():
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(words))

    def _failure_of(self, error: Exception) -> Failure:
        reason = why_not_written(error, self._aside)
        if not self._aside.is_dir() and (reason is None or isinstance(error, FileNotFoundError)):
            return Failure("another rank could not write its part of it")
        return Failure(reason) if reason else Failure(f"{type(error).__name__}: {error}", error)

    def _remove(self, own: Sequence[Path], failure: Failure) -> None:
        """Make room on the disk for this rank's last words, and let rank 0 know."""
        try:
            for path in own:
                path.unlink(missing_ok=True)
            self._leave_word({"failed": f"{failure.reason} (rank {self._rank})"})
        except OSError:
            # Not even a word fits on this disk, or the folder is gone: then rank 0 finds that it is.
            shutil.rmtree(self._aside, ignore_errors=True)

    def _leave_word(self, word: Mapping[str, Any]) -> None:
        path = self._aside / WORDS / f"rank-{self._rank}.json"
        aside = path.with_suffix(".tmp")
        aside.write_text(to_json(word), encoding="utf-8")
        os.replace(aside, path)


def record(path: Path) -> FileRecord:
    """Size and checksum of a file, read back from the disk."""
    flush(path)
    return FileRecord(path.stat().st_size, checksum(path, from_disk=True))


# Beside the copy there must be room for what the training itself may still ask for, and for the disk's cache.
_SHARE = 0.5

# By version of cgroup: its controller, where it lies, the limit's file, that of what is used, and what of this can
# be taken back.
_VERSIONS = (
    ("", "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    (
        "memory",
        "sys/fs/cgroup/memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
)


def room_for_copy() -> int:
    """Bytes that this rank may take now: its share of half of what is available on its host.

    0 where that is not known. A rank counts on every other rank of its host taking as much.
    """
    # As DeepSpeed's launcher says and, without it, torch's; at worst all ranks are on this host.
    ranks = next(
        (os.environ[name] for name in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE", "WORLD_SIZE") if name in os.environ),
        "1",
    )
    return int(_SHARE * available_memory()) // int(ranks)


def available_memory(root: Path = Path("/")) -> int:
    """Bytes of host memory that can be taken without swapping, within this process's control group; 0 if unknown."""
    try:
        lines = (root / "proc" / "meminfo").read_text(encoding="utf-8").splitlines()
        sizes = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
        groups = (root / "proc" / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError, IndexError):
        return 0  # not Linux
    for group in groups:
        _, controllers, path = group.split(":", 2)
        for controller, top, *names in _VERSIONS:
            if controller in controllers.split(","):
                sizes += _left_in_groups(root / top, path, *names)
    return max(0, min(sizes, default=0))


def _left_in_groups(top: Path, path: str, limit: str, used: str, reclaimable: str) -> list[int]:
    """What is left in a control group and in each that holds it; a container sees its own on top."""
    left = []
    folder = top / path.strip("/")
    for group in (folder, *folder.parents):
        if not group.is_relative_to(top):
            break
        try:
            most = int((group / limit).read_text(encoding="utf-8"))
            now = int((group / used).read_text(encoding="utf-8"))
            stat = (group / "memory.stat").read_text(encoding="utf-8").split()
            left.append(most - now + int(stat[stat.index(reclaimable) + 1]))
        except (OSError, ValueError):
            continue  # no such group from here, or the word "max": no limit
    return left
