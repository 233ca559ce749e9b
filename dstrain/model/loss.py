"""The training loss: the sum over label tokens of the cross-entropy, in fp32, with little memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100
"""The label of a position that does not count."""

PIECE = 1 << 24
"""Logits that are in fp32 at a time, as a number of elements: 64 MiB."""


def _pieces(logits: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """A few rows of each at a time."""
    rows = max(1, PIECE // logits.shape[-1])
    return zip(*(tensor.split(rows) for tensor in (logits, *others)), strict=True)


class _SummedCrossEntropy(torch.autograd.Function):
    """Sum of the cross-entropies of ``logits`` [N, V] for ``labels`` [N], in fp32, piece by piece.

    Autograd through ``F.cross_entropy(logits.float(), ...)`` keeps two fp32 copies of all logits; this
    keeps none, and makes one gradient in the dtype of the logits.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        ctx.save_for_backward(logits, labels)
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        for rows, wanted in _pieces(logits, labels):
            total += torch.nn.functional.cross_entropy(
                rows.float(), wanted, ignore_index=IGNORED, reduction="sum"
            )
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None]:
        logits, labels = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for rows, wanted, out in _pieces(logits, labels, gradient):
            counts = wanted != IGNORED
            part = torch.softmax(rows.float(), dim=-1)
            index = wanted.where(counts, 0)[:, None]
            part.scatter_add_(1, index, torch.full_like(index, -1, dtype=part.dtype))
            # where, not a product: an ignored row's gradient is zero even if its logits overflowed.
            out.copy_(torch.where(counts[:, None], part * scale, 0.0))
        return gradient, None


_summed_cross_entropy: Callable[[Tensor, Tensor], Tensor] = _SummedCrossEntropy.apply


class TokenLoss:
    """The loss function of a pipeline's last stage, or of a whole model.

    Called with logits [B, S, V] and (labels int64 [B, S], weight float32 with one element). ``labels[b,
    t]`` is the token *after* position t, -100 where none counts. Returns a float32 scalar: the sum of the
    cross-entropies times ``weight``. With weight = 1 / (label tokens of the global batch), the sum over all
    micro-batches and replicas is the mean over tokens. It is 0.0, with gradients of 0, where no label
    counts.
    """

    def __call__(self, logits: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
        labels, weight = target
        total = _summed_cross_entropy(logits.flatten(0, -2), labels.flatten())
        return total * weight.to(torch.float32).reshape(())


@torch.no_grad()
def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each token, float32 [B, S], without a graph; 0 where ``labels`` [B, S] is -100."""
    losses = [
        torch.nn.functional.cross_entropy(rows.float(), wanted, ignore_index=IGNORED, reduction="none")
        for rows, wanted in _pieces(logits.flatten(0, -2), labels.flatten())
    ]
    return torch.cat(losses).view(labels.shape)
