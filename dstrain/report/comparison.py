"""Compares two runs: losses, gradient norms and final weights, or every step bit by bit."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from dstrain.runs.run_folder import RunFolder, is_validation_loss, read_metrics


@dataclass(frozen=True)
class Difference:
    """Largest relative differences over all steps, and over all weights.

    A weight's difference is relative to the largest element of its tensor.
    """

    loss: float
    grad_norm: float
    weights: float

    def within(self, bound: Difference) -> bool:
        return all(a <= b for a, b in zip(astuple(self), astuple(bound), strict=True))


def compare_runs(run: RunFolder, reference: RunFolder) -> Difference:
    """Compare two finished runs of the same config that were made with ``save_weights``.

    Raises:
        ValueError: they have not the same steps or not the same weights.
    """
    steps, wanted = _steps(run), _steps(reference)
    if steps.keys() != wanted.keys():
        raise ValueError(f"{run.name} has steps {sorted(steps)}, {reference.name} {sorted(wanted)}")
    pairs = [(steps[step], wanted[step]) for step in wanted]
    weights, wanted_weights = _weights(run), _weights(reference)
    if weights.keys() != wanted_weights.keys():
        raise ValueError(f"{run.name} has other weights than {reference.name}")
    return Difference(
        loss=max(_relative(a["loss"], b["loss"]) for a, b in pairs),
        grad_norm=max(_relative(a["grad_norm"], b["grad_norm"]) for a, b in pairs),
        weights=max(_distance(value, wanted_weights[name]) for name, value in weights.items()),
    )


def bound_from(references: list[RunFolder], floor: float) -> Difference:
    """How far a layout may be from the first of several one-process runs that sum in other orders.

    Twice the largest distance between any two of them, and at least ``floor``.

    Raises:
        ValueError: they are infinitely far apart (fp16 skipped other steps, or a loss is no number).
    """
    distances = [
        astuple(compare_runs(a, b)) for index, a in enumerate(references) for b in references[index + 1 :]
    ]
    bound = Difference(
        *(max(floor, 2 * max(column)) for column in zip(*distances or [(0.0,) * 3], strict=True))
    )
    if not all(np.isfinite(value) for value in astuple(bound)):
        raise ValueError("the one-process runs themselves are infinitely far apart: nothing can be compared")
    return bound


def _steps(run: RunFolder) -> dict[int, dict[str, float]]:
    return {record["step"]: record for record in read_metrics(run.metrics) if record["step"] > 0}


def _weights(run: RunFolder) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for path in sorted(run.weights.glob("stage-*.safetensors")):
        found |= load_file(path)
    return found


def _distance(value: np.ndarray, wanted: np.ndarray) -> float:
    """Infinite where one of them holds what is no number: nan would pass for the smallest of all."""
    distance = float(np.abs(value - wanted).max() / max(np.abs(wanted).max(), 1e-30))
    return distance if np.isfinite(distance) else float("inf")


def _relative(found: float | None, wanted: float | None) -> float:
    """A step that fp16's loss scale skipped has no norm; both runs must have skipped it."""
    if found is None or wanted is None:
        return 0.0 if found is wanted else float("inf")
    distance = abs(found - wanted) / max(abs(wanted), 1e-30)
    return distance if np.isfinite(distance) else float("inf")


COMPARED = ("loss", "grad_norm", "lr", "loss_scale")
"""What a step's line says of the numbers, one deciding the next; then the validation losses, which may be taken less
often and change no other number. The other keys count and measure."""


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
        for key in (*COMPARED, *filter(is_validation_loss, {**was[step], **now[step]}))
        if not _same(was[step].get(key), now[step].get(key), often=key in COMPARED)
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
