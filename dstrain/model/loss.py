"""The training loss: a sum over label tokens in fp32. The cross-entropy takes little memory; others are the user's."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils import checkpoint

from dstrain.errors import DstrainError

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


SummedLoss = Callable[[Tensor, Tensor], Tensor]
"""Logits [N, V] and labels int64 [N], -100 where none counts -> the sum of the tokens' losses, a float32 scalar."""

_summed_cross_entropy: SummedLoss = _SummedCrossEntropy.apply

BUILT_IN: dict[str, SummedLoss] = {"cross-entropy": _summed_cross_entropy}
"""The functions of the losses in `dstrain.losses`."""


class _CountedRows(torch.autograd.Function):
    """Logits [N, V] in fp32. The gradient of rows that do not count is zero, whatever comes back for them."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, counts: Tensor) -> Tensor:
        ctx.save_for_backward(counts)
        ctx.dtype = logits.dtype
        return logits.view_as(logits) if logits.dtype == torch.float32 else logits.float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (counts,) = ctx.saved_tensors
        return torch.where(counts[:, None], gradient, 0.0).to(ctx.dtype), None


_counted_rows: Callable[[Tensor, Tensor], Tensor] = _CountedRows.apply


@dataclass(frozen=True)
class OwnLoss:
    """A loss function of the user's own, as a `SummedLoss`.

    Attributes:
        name: ``module:name``, for messages.
        function: takes logits float32 [N, V], labels int64 [N], -100 where none counts, and ``options``; returns the
            losses of the tokens, floats [N]. Those that do not count may be anything, nan too.
        options: keyword arguments, JSON values.
    """

    name: str
    function: Callable[..., Any]
    options: Mapping[str, Any]

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The sum over the tokens that count.

        Raises:
            DstrainError: the function fails, or does not return a loss with a gradient for each token.
        """
        counts = labels != IGNORED
        rows = _counted_rows(logits, counts)
        try:
            # Of its own: a chunk is computed twice, and a change in place must not reach the second time.
            losses = self.function(rows, labels.clone(), **self.options)
        except torch.OutOfMemoryError:  # not this function's fault alone, and it says what the device holds
            raise
        except (Exception, SystemExit) as error:
            if type(error).__module__ == checkpoint.__name__:  # how torch ends the second time early
                raise
            traceback.print_exc()
            raise self._error(
                f"failed: {type(error).__name__}: {error}",
                f"it is called with logits float32 {list(logits.shape)}, labels int64 {list(labels.shape)}, and what"
                " loss_options holds",
            ) from error
        if not isinstance(losses, Tensor):
            raise self._error(f"returned a {type(losses).__name__}, not a tensor", _expected(labels))
        if losses.shape != labels.shape or not losses.is_floating_point():
            kind = str(losses.dtype).removeprefix("torch.")
            raise self._error(f"returned a tensor {kind} {list(losses.shape)}", _expected(labels))
        if logits.requires_grad and torch.is_grad_enabled() and not _follows_from(losses, rows):
            raise self._error(
                "returned losses without a gradient",
                "compute them from logits, without detach() or no_grad()",
            )
        return torch.where(counts, losses.float(), 0.0).sum()

    def _error(self, message: str, hint: str) -> DstrainError:
        return DstrainError(f"loss {self.name} {message}", hint=hint, exit_code=1)


def _follows_from(result: Tensor, source: Tensor) -> bool:
    """Whether a gradient of ``result`` reaches ``source``, which has been computed from something too."""
    seen, open_ = set(), [result.grad_fn]
    while open_:
        node = open_.pop()
        if node is source.grad_fn:
            return True
        if node is not None and node not in seen:
            seen.add(node)
            open_ += [before for before, _ in node.next_functions]
    return False


def _expected(labels: Tensor) -> str:
    return f'return floats of shape [{labels.numel()}], the loss of each token: reduction="none"'


class TokenLoss:
    """The loss function of a pipeline's last stage, or of a whole model.

    Called with logits [B, S, V] and (labels int64 [B, S], weight float32 with one element). ``labels[b,
    t]`` is the token *after* position t, -100 where none counts. Returns a float32 scalar: the sum of the
    tokens' losses times ``weight``. With weight = 1 / (label tokens of the global batch), the sum over all
    micro-batches and replicas is the mean over tokens. It is 0.0, with gradients of 0, where no label
    counts.
    """

    def __init__(self, summed: SummedLoss = _summed_cross_entropy) -> None:
        self._summed = summed

    def __call__(self, logits: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
        """Raises DstrainError as `OwnLoss` does."""
        labels, weight = target
        total = self._summed(logits.flatten(0, -2), labels.flatten())
        return total * weight.to(torch.float32).reshape(())


@torch.no_grad()
def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each token, float32 [B, S], without a graph; 0 where ``labels`` [B, S] is -100."""
    losses = [
        torch.nn.functional.cross_entropy(rows.float(), wanted, ignore_index=IGNORED, reduction="none")
        for rows, wanted in _pieces(logits.flatten(0, -2), labels.flatten())
    ]
    return torch.cat(losses).view(labels.shape)
