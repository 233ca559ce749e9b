"""Follows a run through the files that its ranks write, and reports progress to an observer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from dstrain.api.events import Events, Step
from dstrain.runs.checkpoint.manifest import complete_checkpoints
from dstrain.runs.run_folder import NOTE, RunFolder, losses_by_set, metrics_record


class RunFollower:
    """Made before the ranks start; `update` is called every now and then, and once after their end."""

    def __init__(self, folder: RunFolder, events: Events) -> None:
        self._metrics = _MetricsTail(folder.metrics)
        self._notes = NotesTail(folder.launcher_log)
        self._checkpoints = _CheckpointWatch(folder.checkpoints)
        self._events = events

    def update(self) -> None:
        """Tell what has come since the last call."""
        for note in self._notes.new():
            self._events.note(note)
        for record in self._metrics.new():
            if record["step"] > 0:
                self._events.step(
                    Step(
                        step=record["step"],
                        loss=record["loss"],
                        lr=record["lr"],
                        grad_norm=record["grad_norm"],
                        tokens=record["tokens"],
                        seconds=record["seconds"],
                        metrics=record,
                    )
                )
            if "validation_loss" in record:
                self._events.validated(record["step"], record["validation_loss"], losses_by_set(record))
        for path in self._checkpoints.new():
            self._events.saved(int(path.name.removeprefix("step-")), path)


class NotesTail:
    """What rank 0 says to the user during a run, found among the lines of the launcher's log."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._position = log.stat().st_size if log.exists() else 0
        self._rest = b""

    def new(self) -> list[str]:
        """Without what stands in front of them: the mark, and the host's name that pdsh writes."""
        try:
            with self._log.open("rb") as file:
                file.seek(self._position)
                new = file.read()
        except OSError:
            return []
        self._position += len(new)
        *lines, self._rest = (self._rest + new).split(b"\n")
        parted = [line.decode(errors="replace").partition(NOTE) for line in lines]
        return [note for _, mark, note in parted if mark]


class _MetricsTail:
    """The lines of a metrics.jsonl that were not there when this was made.

    A resumed run writes the file anew, without the steps that it will repeat: what stood there before is known by its
    lines, since the new file may be as long as the old one when it is read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        old = path.read_bytes() if path.exists() else b""
        self._old = frozenset(old.split(b"\n"))
        self._file: int | None = None
        self._position = 0
        self._rest = b""

    def new(self) -> list[dict[str, Any]]:
        """Whole lines that were not there at the start, and were not read before."""
        try:
            with self._path.open("rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                if inode != self._file:
                    self._file, self._position, self._rest = inode, 0, b""
                file.seek(self._position)
                new = file.read()
        except (
            OSError
        ):  # not there yet; or its disk does not answer, for which a run that is well does not end
            return []
        self._position += len(new)
        *lines, self._rest = (self._rest + new).split(b"\n")
        records = (metrics_record(line) for line in lines if line not in self._old)
        return [record for record in records if record is not None]


class _CheckpointWatch:
    """New checkpoints. A folder that has not changed is not read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._changed_at = self._time()
        self._known = {path.name for path in complete_checkpoints(folder)}

    def new(self) -> list[Path]:
        changed_at = self._time()
        if changed_at == self._changed_at:
            return []
        self._changed_at = changed_at
        found = [path for path in complete_checkpoints(self._folder) if path.name not in self._known]
        self._known |= {path.name for path in found}
        return sorted(found)

    def _time(self) -> int:
        try:
            return self._folder.stat().st_mtime_ns
        except OSError:
            return 0
