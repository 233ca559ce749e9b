"""Checkpoints: written aside, flushed, checked, then named by one rename; complete or invisible."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from dstrain import __version__
from dstrain.engine.interface import Engine
from dstrain.errors import DstrainError
from dstrain.plan.identity import is_other_layout, refuse_other
from dstrain.plan.integrity import checksum, share_out, wrong_files
from dstrain.plan.manifest import (
    MANIFEST,
    FileRecord,
    choose_newest,
    complete_checkpoints,
    file_sizes,
    files_of,
    make_manifest,
    missing_or_cut,
    newest_complete,
    note_damage,
    passed_over,
    read_manifest,
)

# As much as shows whether a disk takes anything at all.
_PROBE_BYTES = 1024 * 1024


class Checkpoints:
    """The checkpoints of one run folder. ``save``, ``newest_usable`` and ``load_newest`` are collective."""

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        identity: Mapping[str, Any],
        run: str,
        config: Mapping[str, Any],
        keep_every: int = 0,
        say: Callable[[str], None] = print,
    ) -> None:
        """
        Args:
            folder: ``checkpoints/`` of the run folder.
            keep: how many of the newest are kept.
            identity: what a checkpoint must agree with to be loaded (model, data), and the layout.
            run: the run's id, the same on all ranks.
            config: the run config.
            keep_every: those whose step is a multiple of it are kept for good; 0 for none.
            say: takes a line for the user; called on rank 0 alone.
        """
        self.folder = folder
        self.keep = keep
        self.keep_every = keep_every
        self.identity = dict(identity)
        self.run = run
        self._config = dict(config)
        self._say = say
        self._rank = distributed.get_rank()
        self._damaged: dict[str, str] = {}
        self._passed: dict[str, str] = {}

    def save(self, engine: Engine, step: int) -> Path:
        """Save the state after ``step``; returns the checkpoint's folder.

        Raises:
            DstrainError: it could not be written (a full disk, for one). What was written of it is removed.
        """
        final = self.folder / f"step-{step:06d}"
        aside = self.folder / f".step-{step:06d}.partial"
        try:
            if self._rank == 0:
                self._remove_leftovers()
                aside.mkdir(parents=True)
            distributed.barrier()
            engine.save(aside, {"step": step, "run": self.run})
            _flush(aside)
            distributed.barrier()
            files = self._checksums(aside)
            if self._rank == 0:
                self._write_manifest(aside, step, files)
                self._give_name(aside, final)
        except Exception as error:
            refusal = self._not_written(error, step, aside)
            if refusal is None:
                raise
            raise refusal from error
        if self._rank == 0:
            self._prune()
        distributed.barrier()
        return final

    def load_newest(self, engine: Engine) -> int:
        """Load the newest usable checkpoint and return its step; 0 where no checkpoint was made yet.

        Raises:
            DstrainError: none is usable, or it belongs to another model, data, optimizer or precision.
        """
        folder = self.newest_usable()
        if folder is None:
            return 0
        refuse_other(folder, self.identity)
        return int(engine.load(folder, other_layout=is_other_layout(folder, self.identity))["step"])

    def newest_usable(self) -> Path | None:
        """The newest checkpoint of this run all of whose bytes are those that were saved. Every byte is read.

        Those that are passed over are named in a line each. None where no checkpoint was made yet.

        Raises:
            DstrainError: there are checkpoints, and none is usable; on every rank.
        """
        while True:
            folder = self._candidate()
            if folder is None:
                return None
            why = self._wrong_bytes(folder)
            if why is None:
                self._say_passed(folder)
                return folder
            self._damaged[folder.name] = why
            if self._rank == 0:
                try:
                    note_damage(folder, why)
                except OSError as error:  # a disk that is full, or can't be written: it is said all the same
                    print(f"{folder}: no note of its damage was left: {error}")

    def _candidate(self) -> Path | None:
        """Rank 0 looks at names, manifests and sizes, so that all ranks choose alike."""
        told: list[Any] = [None, None, ()]
        if self._rank == 0:
            try:
                choice = choose_newest(self.folder, self.run, self._damaged)
                told = [str(choice.checkpoint) if choice.checkpoint else None, None, choice.passed]
            except DstrainError as error:
                told[1] = (error.message, error.hint, error.where)
        distributed.broadcast_object_list(told, src=0)
        path, refusal, passed = told
        if refusal is not None:
            message, hint, where = refusal
            raise DstrainError(message, hint=hint, where=where)
        self._passed = dict(passed)
        return Path(path) if path else None

    def _say_passed(self, used: Path) -> None:
        for name, why in self._passed.items():
            if self._rank == 0:
                self._say(passed_over(name, why, used.name))

    def _wrong_bytes(self, folder: Path) -> str | None:
        """What is wrong with the first wrong file, the same on all ranks; each reads its share."""
        files = files_of(read_manifest(folder))
        if self._rank == 0 and any(file.sha256 is None for file in files.values()):
            self._say(
                f"{folder.name} was saved by an earlier dstrain, without checksums: only sizes are checked"
            )
        sizes = {name: file.size for name, file in files.items()}
        share = share_out(sizes, distributed.get_world_size())[self._rank]
        found: dict[str, str] = {}
        for part in _gathered(wrong_files(folder, files, share)):
            found |= part
        if not found:
            return None
        name = min(found)
        more = f", and {len(found) - 1} more of its files" if len(found) > 1 else ""
        return found[name] + more

    def _checksums(self, aside: Path) -> dict[str, FileRecord]:
        """Size and checksum of every file, read back from the disk; each rank reads its share."""
        listed: list[Any] = [file_sizes(aside) if self._rank == 0 else None]
        distributed.broadcast_object_list(listed, src=0)
        sizes: dict[str, int] = listed[0]
        share = share_out(sizes, distributed.get_world_size())[self._rank]
        own = {name: checksum(aside / name, from_disk=True) for name in share}
        return {
            name: FileRecord(sizes[name], sha256) for part in _gathered(own) for name, sha256 in part.items()
        }

    def _write_manifest(self, aside: Path, step: int, files: Mapping[str, FileRecord]) -> None:
        manifest = make_manifest(
            step=step,
            run=self.run,
            identity=self.identity,
            config=self._config,
            versions={
                "dstrain": __version__,
                "torch": torch.__version__,
                **{name: importlib.metadata.version(name) for name in ("deepspeed", "transformers")},
            },
            saved_at=time.time(),
            files=files,
        )
        with (aside / MANIFEST).open("w", encoding="utf-8") as file:
            file.write(json.dumps(manifest, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        _flush_folders(aside)
        why = missing_or_cut(aside, files_of(read_manifest(aside)))
        if why is not None:
            raise OSError(f"what was written is not what lies on the disk: {why}")

    def _give_name(self, aside: Path, final: Path) -> None:
        """One rename. A damaged checkpoint of the same step goes first, hidden until it is removed."""
        if final.exists():
            os.replace(final, _hidden(final))
        os.replace(aside, final)
        self._damaged.pop(final.name, None)
        _flush_folder(self.folder)
        _flush_folder(self.folder.parent)

    def _prune(self) -> None:
        """Remove all but the newest ``keep`` and those that are kept for good; a damaged one is left as it is."""
        complete = [path for path in complete_checkpoints(self.folder) if path.name not in self._damaged]
        for old in complete[: -self.keep]:
            if not (self.keep_every and int(old.name.removeprefix("step-")) % self.keep_every == 0):
                os.replace(old, _hidden(old))
        self._remove_leftovers()

    def _remove_leftovers(self) -> None:
        """What was being written or removed when a process ended."""
        for pattern in (".step-*.partial", ".step-*.removed"):
            for stale in self.folder.glob(pattern):
                shutil.rmtree(stale, ignore_errors=True)

    def _not_written(self, error: Exception, step: int, aside: Path) -> DstrainError | None:
        """Remove what was written, so that the disk has room for this rank's last words, and give the user's one.

        None for an error that has nothing to do with writing: the connection to a rank that failed, for one.
        """
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else None
        if reason is None and aside.is_dir():
            reason = _refusal_of_disk(aside)
        shutil.rmtree(aside, ignore_errors=True)
        if reason is None and not _is_of_torch_writer(error):
            return None
        usable = newest_complete(self.folder)
        kept = f"{usable.name} is whole and can be resumed from" if usable else "no checkpoint was made yet"
        return DstrainError(
            f"the checkpoint of step {step} could not be written: {reason or str(error).splitlines()[0]}",
            where=str(self.folder),
            hint=f"{kept}; make room on this disk, or keep fewer checkpoints (--keep, --keep-every)",
            exit_code=1,
        )


def _gathered(part: dict[str, str]) -> list[dict[str, str]]:
    """Every rank's part, on every rank."""
    parts: list[dict[str, str]] = [{} for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(parts, part)
    return parts


def _hidden(checkpoint: Path) -> Path:
    """The name under which a checkpoint is removed, so that half of it is never taken for a damaged one."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.removed")
    shutil.rmtree(hidden, ignore_errors=True)
    return hidden


def _refusal_of_disk(folder: Path) -> str | None:
    """Why the disk takes no more, found by trying: torch's writer says only that it failed."""
    probe = folder / f"probe-{os.getpid()}"
    try:
        with probe.open("wb") as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror
    probe.unlink()
    return None


def _is_of_torch_writer(error: Exception) -> bool:
    """torch.save's C++ writer raises a RuntimeError for whatever the disk says."""
    return isinstance(error, RuntimeError) and any(
        word in str(error)
        for word in ("PytorchStreamWriter", "inline_container", "unexpected pos", "file write")
    )


def _flush(folder: Path) -> None:
    """Bring every file of the folder to the disk before it gets its name."""
    for path in folder.rglob("*"):
        if path.is_file():
            _flush_folder(path)


def _flush_folders(folder: Path) -> None:
    """Bring the folder's own entries to the disk, and those of the folders below it."""
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            _flush_folder(path)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
