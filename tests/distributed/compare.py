"""How far two trainings are apart."""

from __future__ import annotations

from dataclasses import dataclass

from tests.distributed.training import Outcome


@dataclass(frozen=True)
class Difference:
    """Largest relative differences: of a step's loss, of its gradient norm, of a weight tensor, of the held-out loss.

    A weight tensor's difference is relative to its own largest element.
    """

    loss: float
    norm: float
    weights: float
    held_out: float

    @property
    def worst(self) -> float:
        return max(self.loss, self.norm, self.weights, self.held_out)


def difference(ranks: list[Outcome], reference: Outcome) -> Difference:
    """Between all ranks of a layout and the plain loop. Every weight of the model must be on some rank."""
    seen = {name for rank in ranks for name in rank.weights}
    assert seen == set(reference.weights), seen ^ set(reference.weights)
    weights = 0.0
    for rank in ranks:
        assert len(rank.losses) == len(reference.losses)
        for name, value in rank.weights.items():
            wanted = reference.weights[name]
            weights = max(weights, float((value - wanted).abs().max() / wanted.abs().max()))
    return Difference(
        loss=max(_relative(rank.losses, reference.losses) for rank in ranks),
        norm=max(_relative(rank.norms, reference.norms) for rank in ranks),
        weights=weights,
        held_out=max(_relative([rank.held_out], [reference.held_out]) for rank in ranks),
    )


def _relative(found: list[float | None], wanted: list[float | None]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(found, wanted, strict=True))  # type: ignore[operator,arg-type]
