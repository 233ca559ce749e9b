"""TensorBoard tracker: event files in ``tensorboard/`` of the run folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dstrain.hooks.trackers import Record, State, Tracker, numbers_in
from dstrain.train.hooks import StartInfo


class TensorBoardTracker(Tracker):
    """A tag for each value, by its name in metrics.jsonl; the config as a text."""

    name = "tensorboard"

    def __init__(self) -> None:
        self._writer: Any = None
        super().__init__()

    def load(self) -> None:
        import torch.utils.tensorboard  # noqa: F401

    def open(self, info: StartInfo) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # A launch that goes on from a checkpoint repeats steps: their earlier events are not shown any more.
        repeated_from = info.first_step if info.first_step > 1 else 0
        self._writer = SummaryWriter(str(Path(info.folder) / "tensorboard"), purge_step=repeated_from)
        rows = [f"| {key} | `{value}` | {info.origins.get(key, '')} |" for key, value in info.config.items()]
        table = "\n".join(["| key | value | from |", "| --- | --- | --- |", *rows])
        self._writer.add_text("config", table, info.first_step - 1)

    def write(self, records: Sequence[Record]) -> None:
        for when, record in records:
            for key, value in numbers_in(record).items():
                self._writer.add_scalar(key, value, record["step"], walltime=when)
        self._writer.flush()

    def close(self, state: State) -> None:
        self._writer.close()
