"""What is requested of the model's head: the loss, the logits of one position, or all logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from dstrain.model.loss import TokenLoss

_VALIDATION_LOSS = TokenLoss()


class HeadOutputRequest:
    """Mixed into what computes logits. DeepSpeed's engines hand a model its inputs only, so the rest is asked here.

    Attributes:
        target: (labels int64 [B, S], weight float32 [1]): the result is the loss, a float32 scalar.
        position: (row, place): the result is the logits [V] there. With neither: all logits [B, S, V].
        training_loss: what ``target`` asks for in training; in evaluations it is the cross-entropy.
        loss_chunk: tokens whose logits are made at a time for the loss, and made again in the backward pass; 0 for
            all at once.
    """

    target: tuple[Tensor, Tensor] | None = None
    position: tuple[int, int] | None = None
    training_loss: TokenLoss = TokenLoss()
    loss_chunk: int = 0
    training: bool
    """As in `torch.nn.Module`, whose `train` and `eval` set it."""

    def set_loss(self, loss: TokenLoss | None, chunk: int) -> None:
        """Choose the training loss (None: the cross-entropy) and ``loss_chunk``."""
        self.training_loss, self.loss_chunk = loss or TokenLoss(), chunk

    def loss_of(self, logits: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
        """The loss of logits [B, S, V], a float32 scalar; ``target`` as above. Raises DstrainError as it does."""
        return (self.training_loss if self.training else _VALIDATION_LOSS)(logits, target)

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
