"""Whether a run was reproduced bit by bit, step by step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from dstrain.runs.run_folder import RunFolder, read_metrics

COMPARED = ("loss", "grad_norm", "lr", "loss_scale", "validation_loss")
"""What a step's line says of the numbers, one deciding the next; the other keys count and measure."""
_NOT_ALWAYS = ("validation_loss",)  # how often it is taken changes no other number


@dataclass(frozen=True)
class Deviation:
    """The first number that is another: of this step (0: before training), under this name in metrics.jsonl."""

    step: int
    what: str
    was: float | None
    now: float | None

    def __str__(self) -> str:
        where = f"step {self.step}: {self.what}" if self.step else f"before training: {self.what}"
        text = f"{where} was {self.was!r} and is {self.now!r}"
        if self.was is None or self.now is None:
            return text
        apart = abs(self.now - self.was) / max(abs(self.was), math.ulp(0.0))
        return f"{text} (relative {apart:.1e})"


@dataclass(frozen=True)
class Repetition:
    """Two runs side by side.

    Attributes:
        steps: those that both have trained.
        of_run, of_again: the last step of each.
        deviation: the first number that differs; None: all that both have are the same bits.
    """

    steps: int
    of_run: int
    of_again: int
    deviation: Deviation | None

    def to_record(self) -> dict[str, Any]:
        """For ``reproduction.json``."""
        return {
            "equal": self.deviation is None,
            "steps": self.steps,
            "last_steps": [self.of_run, self.of_again],
            "deviation": None if self.deviation is None else str(self.deviation),
        }


def compare_bits(run: RunFolder, again: RunFolder) -> Repetition:
    """Compare the metrics of two runs. JSON's numbers are read back as the very floats that were written."""
    was = {record["step"]: record for record in read_metrics(run.metrics)}
    now = {record["step"]: record for record in read_metrics(again.metrics)}
    both = sorted(was.keys() & now.keys())
    found = (
        Deviation(step, key, was[step].get(key), now[step].get(key))
        for step in both
        for key in COMPARED
        if not _same(was[step].get(key), now[step].get(key), often=key not in _NOT_ALWAYS)
    )
    return Repetition(
        steps=sum(step > 0 for step in both),
        of_run=max(was, default=0),
        of_again=max(now, default=0),
        deviation=next(found, None),
    )


def _same(was: float | None, now: float | None, *, often: bool) -> bool:
    if was is None or now is None:
        return was is now or not often
    return was == now or (math.isnan(was) and math.isnan(now))
