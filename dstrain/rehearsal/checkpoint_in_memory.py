"""A rehearsed rank's checkpoint: what DeepSpeed would write stays in memory, and is what it reads back."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dstrain.engine.async_checkpoint import AsyncCheckpointStage, host_copy
from dstrain.engine.interface import Engine

_STAGE = re.compile(r"mp_rank_\d\d_")
"""In the names of files that each stage has one of."""


class CheckpointInMemory:
    """In place of `dstrain.train.checkpointing.checkpoints.Checkpoints`: fake tensors can't be written to a file.

    Args:
        folder: where the files would lie; empty ones stand there for DeepSpeed, which looks for them.
        stages: of the pipeline.
    """

    def __init__(self, folder: Path, *, stages: int) -> None:
        self._folder = folder
        self._stages = stages
        self._states: dict[Path, Any] = {}

    def raise_if_failed(self) -> None:
        """Nothing fails in memory."""

    def take_completed(self) -> list[tuple[int, Path]]:
        return []

    def save(self, engine: Engine, step: int, streams: Sequence[Any] | None = None) -> Path:
        """As with ``background_save``, which copies everything to host memory first."""
        held = AsyncCheckpointStage(sys.maxsize)
        engine.save(self._folder, {"step": step, "run": "rehearsal", "streams": streams}, held)
        self._states = {each: state for path, state in held.states for each in self._of_all_stages(path)}
        for path in self._states:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return self._folder

    def _of_all_stages(self, path: Path) -> list[Path]:
        """A stage's file, and those that the other stages write: DeepSpeed counts them, and looks into the first."""
        stages = range(self._stages)
        return [path.with_name(_STAGE.sub(f"mp_rank_{stage:02d}_", path.name)) for stage in stages]

    def load(self, adapter: Any) -> None:
        """As a run that goes on in the same layout."""
        adapter.engine.checkpoint_engine.load = self._read
        adapter.load(self._folder)

    def _read(self, path: str | Path, map_location: Any = None) -> Any:
        """In place of ``torch.load``: tensors of its own each time."""
        return host_copy(self._states[Path(path)])
