"""The losses of the validation sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from dstrain.data.training_data import ValidationSet
from dstrain.engine.interface import Engine
from dstrain.planning.batch import Batch
from dstrain.train.batches import ValidationBatches

VALIDATION_LOSS = "validation_loss"
"""In metrics: of the only set, or the mean over the label tokens of all sets. Those of a set: validation_loss/NAME."""


class Validation:
    """Takes the loss of each set on the same samples every time.

    Args:
        sets: maybe none.
        samples: of each set.
        replica: whose share this rank computes.
        device: where it is computed: for a CUDA device the samples are kept in pinned memory.
    """

    def __init__(
        self,
        sets: Sequence[ValidationSet],
        engine: Engine,
        batch: Batch,
        *,
        samples: int,
        replica: int,
        device: torch.device,
    ) -> None:
        self._engine = engine
        self._batches = {
            each.name: ValidationBatches(
                each.rows,
                batch,
                samples=samples,
                replica=replica,
                fewest=engine.fewest_micro_batches,
                pinned=device.type == "cuda",
            )
            for each in sets
        }

    def __bool__(self) -> bool:
        return bool(self._batches)

    def losses(self) -> dict[str, float]:
        """By their names in metrics."""
        found = {name: self._engine.eval_loss(of.micro_batches()) for name, of in self._batches.items()}
        return with_mean(found, {name: of.label_tokens for name, of in self._batches.items()})


def with_mean(losses: Mapping[str, float], label_tokens: Mapping[str, int]) -> dict[str, float]:
    """The losses of sets by their names in metrics, with their mean over label tokens first."""
    if list(losses) == [""]:
        return {VALIDATION_LOSS: losses[""]}
    total = sum(label_tokens.values())
    mean = sum(loss * label_tokens[name] for name, loss in losses.items()) / max(1, total)
    return {VALIDATION_LOSS: mean, **{f"{VALIDATION_LOSS}/{name}": loss for name, loss in losses.items()}}
