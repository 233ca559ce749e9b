"""What is requested of the model's head: the loss, the logits of one position, or all logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor


class HeadOutputRequest:
    """Mixed into what computes logits. DeepSpeed's engines hand a model its inputs only, so the rest is asked here.

    Attributes:
        target: (labels int64 [B, S], weight float32 [1]): the result is the loss, a float32 scalar.
        position: (row, place): the result is the logits [V] there. With neither: all logits [B, S, V].
        loss_chunk: tokens whose logits are made at a time for the loss, and made again in the backward pass; 0 for
            all at once.
    """

    target: tuple[Tensor, Tensor] | None = None
    position: tuple[int, int] | None = None
    loss_chunk: int = 0

    @contextmanager
    def asked(
        self, *, target: tuple[Tensor, Tensor] | None = None, position: tuple[int, int] | None = None
    ) -> Iterator[None]:
        """Ask for something inside this context."""
        self.target, self.position = target, position
        try:
            yield
        finally:
            self.target = self.position = None
