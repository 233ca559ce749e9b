"""Whether a run was repeated to the bit, step by step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dstrain.plan.run_folder import RunFolder, read_metrics

COMPARED = ("loss", "grad_norm", "lr", "loss_scale", "held_out_loss")
"""What a step's line says of the numbers, one deciding the next; the other keys count and measure."""


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
        missing: the first step that only one of them has; None where they have the same.
        deviation: the first number that differs; None: all are the same bits.
    """

    steps: int
    missing: int | None
    deviation: Deviation | None

    @property
    def equal(self) -> bool:
        return self.missing is None and self.deviation is None


def compare_bits(run: RunFolder, again: RunFolder) -> Repetition:
    """Compare the metrics of two runs. JSON's numbers are read back as the very floats that were written."""
    was = {record["step"]: record for record in read_metrics(run.metrics)}
    now = {record["step"]: record for record in read_metrics(again.metrics)}
    both = sorted(was.keys() & now.keys())
    only_one = was.keys() ^ now.keys()
    deviation = next(
        (
            Deviation(step, key, was[step].get(key), now[step].get(key))
            for step in both
            for key in COMPARED
            if was[step].get(key) != now[step].get(key)
        ),
        None,
    )
    return Repetition(
        steps=sum(step > 0 for step in both),
        missing=min(only_one, default=None),
        deviation=deviation,
    )
