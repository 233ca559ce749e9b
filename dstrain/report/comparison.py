"""Compares two runs: losses, gradient norms and final weights."""

from __future__ import annotations

from dataclasses import astuple, dataclass

import numpy as np
from safetensors.numpy import load_file

from dstrain.runs.run_folder import RunFolder, read_metrics


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
