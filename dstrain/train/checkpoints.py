"""Checkpoints: written aside, then named by one rename; complete or invisible."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from dstrain import __version__
from dstrain.engine.interface import Engine
from dstrain.plan.manifest import MANIFEST, complete_checkpoints, file_sizes, newest_complete, refuse_other


class Checkpoints:
    """The checkpoints of one run folder. ``save`` and ``load`` are collective."""

    def __init__(self, folder: Path, *, keep: int, identity: Mapping[str, Any]) -> None:
        """
        Args:
            folder: ``checkpoints/`` of the run folder.
            keep: how many of the newest are kept.
            identity: what a checkpoint must agree with to be loaded (layout, model, data).
        """
        self.folder = folder
        self.keep = keep
        self.identity = dict(identity)
        self._rank = distributed.get_rank()

    def save(self, engine: Engine, step: int) -> Path:
        """Save the state after ``step``; returns the checkpoint's folder."""
        final = self.folder / f"step-{step:06d}"
        aside = self.folder / f".step-{step:06d}.partial"
        if self._rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        distributed.barrier()
        engine.save(aside, {"step": step})
        _flush(aside)
        distributed.barrier()
        if self._rank == 0:
            manifest = {
                "step": step,
                "dstrain": __version__,
                "torch": torch.__version__,
                "identity": self.identity,
                "files": file_sizes(aside),
            }
            (aside / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
            _flush(aside)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(aside, final)
            _flush_folder(self.folder)
            self._prune()
        distributed.barrier()
        return final

    def load_newest(self, engine: Engine) -> int:
        """Load the newest complete checkpoint and return its step; 0 when there is none.

        Raises:
            DstrainError: it belongs to another layout, model or data.
        """
        choice: list[str | None] = [None]
        if self._rank == 0:
            newest = newest_complete(self.folder)
            choice = [str(newest) if newest else None]
        distributed.broadcast_object_list(choice, src=0)
        if choice[0] is None:
            return 0
        folder = Path(choice[0])
        refuse_other(folder, self.identity)
        return int(engine.load(folder)["step"])

    def _prune(self) -> None:
        complete = complete_checkpoints(self.folder)
        for old in complete[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)
        for stale in self.folder.glob(".step-*.partial"):
            shutil.rmtree(stale, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Bring every file of the folder to the disk before it gets its name."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
