"""torch.profiler hook: ``profile: {steps: [10, 13]}``; one trace per requested rank."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dstrain.files import make_folder
from dstrain.train.hooks import EndInfo, Hook, StartInfo, StepInfo


class Profiler(Hook):
    """Records what this rank does on the CPU and its GPU, into ``profile/rank-N.pt.trace.json`` of the run folder.

    Chrome's about:tracing and https://ui.perfetto.dev show such files.

    Args:
        steps: the first and the last step that are recorded; of a launch that begins between them, the rest.
        ranks: which record.
    """

    every_rank = True

    def __init__(self, steps: Sequence[int], ranks: Sequence[int] = (0,)) -> None:
        self._first, self._last = steps
        self._ranks = ranks
        self._profiler: Any = None
        self._mark: Any = None  # around the step that is recorded
        self._file = Path()
        self._is_asked = False

    def on_start(self, info: StartInfo) -> None:
        self._is_asked = info.rank in self._ranks
        self._file = Path(info.folder) / "profile" / f"rank-{info.rank}.pt.trace.json"
        self._first = max(self._first, info.first_step)
        self._begin_before(info.first_step)

    def on_step(self, info: StepInfo) -> None:
        if self._profiler is not None:
            self._mark.__exit__(None, None, None)
            if info.step < self._last:
                self._mark_step(info.step + 1)
            else:
                self._write(info.step)
        self._begin_before(info.step + 1)

    def on_end(self, info: EndInfo) -> None:
        """The launch leaves while it records: what there is, is kept."""
        if self._profiler is not None:
            self._mark.__exit__(None, None, None)
            self._write(info.step)

    def _begin_before(self, step: int) -> None:
        if not self._is_asked or step != self._first or step > self._last:
            return
        import torch
        from torch.profiler import ProfilerActivity, profile

        gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        self._profiler = profile(activities=[ProfilerActivity.CPU, *gpu])
        self._profiler.start()
        self._mark_step(step)

    def _mark_step(self, step: int) -> None:
        from torch.profiler import record_function

        self._mark = record_function(f"ProfilerStep#{step}")  # what viewers take for a step
        self._mark.__enter__()

    def _write(self, last: int) -> None:
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        make_folder(self._file.parent, below=self._file.parent.parent)
        aside = self._file.with_name(f".{secrets.token_hex(8)}.{self._file.name}")
        profiler.export_chrome_trace(str(aside))
        aside.replace(self._file)
        self.say(f"steps {self._first} to {last} were profiled: {self._file}")
