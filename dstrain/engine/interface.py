"""The engine interface that the training loop uses, the same for a pipeline and for one stage."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dstrain.engine.async_checkpoint import AsyncCheckpointStage
from dstrain.model.document_lengths import DocumentLengths


@dataclass(frozen=True)
class MicroBatch:
    """One replica's samples of one forward pass.

    Attributes:
        input_ids, position_ids: int64 [B, S].
        labels: int64 [B, S], already shifted; -100 where there is none.
        weight: what the sum of the token losses is multiplied with, float32 [1]. Engines average
            over micro-batches and replicas, so with accumulation x replicas / (label tokens of the
            global batch) the result is the mean over all of these.
        documents: where they lie, so that nobody needs to ask the device, and the seeds of rows; None where that is not
            known.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    weight: torch.Tensor
    documents: DocumentLengths | None = None

    def as_pipeline_item(self) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """DeepSpeed's form: the first stage's inputs, the last stage's labels."""
        return (self.input_ids, self.position_ids), (self.labels, self.weight)

    def to(self, device: torch.device) -> MicroBatch:
        """On a device; from pinned memory the copy runs beside the computing."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> MicroBatch:
        """In memory of the host that a GPU copies from by itself."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> MicroBatch:
        return MicroBatch(
            change(self.input_ids),
            change(self.position_ids),
            change(self.labels),
            change(self.weight),
            self.documents and self.documents.each(change),
        )


@dataclass(frozen=True)
class StepResult:
    """One optimizer step: loss over the global batch, gradient norm before clipping, if it was taken.

    ``applied`` is False for a step that fp16's dynamic loss scale skipped; its norm is inf.
    """

    loss: float
    grad_norm: float
    applied: bool
    loss_scale: float


class Engine(ABC):
    """One rank's part of the training. Every method is collective: all ranks call it together."""

    # The schedule needs at least so many micro-batches in each call, evaluations included.
    fewest_micro_batches: int = 1

    @abstractmethod
    def train_batch(self, micro_batches: Sequence[MicroBatch], lr: float) -> StepResult:
        """One optimizer step over this replica's micro-batches (as many as the accumulation)."""

    @abstractmethod
    def eval_loss(self, micro_batches: Sequence[MicroBatch]) -> float:
        """Weighted loss, averaged over micro-batches and replicas; no gradients, no dropout."""

    @abstractmethod
    def next_token_logits(self, micro_batch: MicroBatch, row: int, position: int) -> torch.Tensor:
        """Logits [V], fp32 on CPU, after one position of one row; the same on every rank."""

    @abstractmethod
    def check_replicas(self) -> None:
        """Make sure that replicas, and the copies of tied weights, are equal to the bit.

        Raises:
            ReplicasDifferError: they are not; the message says which and where.
        """

    @abstractmethod
    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """This stage's parameters by Hugging Face name, whole, in fp32 on CPU, one at a time."""

    @abstractmethod
    def help_with_weights(self) -> None:
        """Take part in `weights` of other replicas, without any of them in this host's memory."""

    @abstractmethod
    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of what `weights` gives, by name. Not collective."""

    @abstractmethod
    def save(self, folder: Path, state: Mapping[str, Any], held: AsyncCheckpointStage | None = None) -> None:
        """Write this rank's part of a checkpoint below ``folder``.

        Args:
            state: is kept with it; small and JSON-like.
            held: takes copies of what is to be written, as far as it has room. The rest is written at once,
                and everything where there is no ``held``.
        """

    @abstractmethod
    def load(
        self, folder: Path, *, other_layout: bool = False, say: Callable[[str], None] = print
    ) -> dict[str, Any]:
        """Read this rank's part back and return ``state``.

        Args:
            other_layout: the checkpoint was saved by another layout, of which every file can be read here. Without
                it what is loaded is equal to the bit, padding and all.
            say: takes a line for the user, where the reading takes long.

        Raises:
            DstrainError: a file is missing or can't be read, or names what is no data: no code of it is run.
        """


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""``precision`` of the configuration -> the type of the weights that the model computes with."""
