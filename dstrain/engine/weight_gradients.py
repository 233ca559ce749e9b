"""Backward passes in two parts: the gradients of the inputs at once, those of linear layers' weights later.

A stage hands the gradient of its input on as soon as it has it, and computes the weights' in a gap of the schedule.
What is put off are matrix multiplications alone; norms, embeddings and whatever else a model has get their gradients at
once. A weight's gradient comes to DeepSpeed as in any backward pass, by autograd, once a micro-batch.

Source: Qi et al. 2023, Zero Bubble Pipeline Parallelism (arXiv 2401.10241).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_Part = Callable[[], Tensor]

_linear = functional.linear


class PutOffGradients:
    """The gradients that a micro-batch's backward pass over a chunk has left for later.

    Args:
        takes: the parameters whose gradients may be put off.
    """

    def __init__(self, takes: Set[nn.Parameter]) -> None:
        self.takes = takes
        self._parts: dict[Tensor, list[_Part]] = {}

    def add(self, parameter: Tensor, part: _Part) -> None:
        self._parts.setdefault(parameter, []).append(part)

    def compute(self) -> None:
        """Compute and accumulate them, one parameter after the other; what they were made of is gone then."""
        while self._parts:
            parameter = next(iter(self._parts))
            parts = self._parts.pop(parameter)
            gradient = parts.pop(0)()
            while parts:
                gradient += parts.pop(0)()
            torch.autograd.backward([parameter], [gradient])


_put_off: PutOffGradients | None = None
"""Where linear layers that run now put their weights' gradients. Autograd's threads read it too."""


@contextmanager
def putting_off(gradients: PutOffGradients | None) -> Iterator[None]:
    """Within it, the backward passes of linear layers that run forward leave their weights' gradients there."""
    global _put_off
    before, _put_off = _put_off, gradients
    try:
        yield
    finally:
        _put_off = before


def install() -> None:
    """From now on in this process, linear layers may put gradients off: `torch.nn.functional.linear` asks."""
    functional.linear = linear


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, whose weight's gradient may be put off.

    Not where no gradient goes back to the input: there is nothing to hurry.
    """
    gradients = _put_off
    if (
        gradients is None
        or not torch.is_grad_enabled()
        or not input.requires_grad
        or weight not in gradients.takes
        or not weight.requires_grad
        or (bias is not None and bias not in gradients.takes)
        or torch.is_autocast_enabled(input.device.type)
    ):
        return _linear(input, weight, bias)
    offset = None if bias is None else bias.detach()
    parameters = weight, bias
    return _apply(input, weight.detach(), offset, parameters, gradients)


class _Linear(torch.autograd.Function):
    """A linear layer that does not know its parameters, but where their gradients go."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        values: Tensor,
        offset: Tensor | None,
        parameters: tuple[Tensor, Tensor | None],
        gradients: PutOffGradients,
    ) -> Tensor:
        ctx.save_for_backward(input, values)
        ctx.parameters, ctx.gradients = parameters, gradients  # in a tuple autograd does not see them
        return _linear(input, values, offset)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        (gradient,) = outputs
        input, values = ctx.saved_tensors
        weight, bias = ctx.parameters

        def of_weight() -> Tensor:
            return gradient.flatten(0, -2).t().mm(input.flatten(0, -2))

        ctx.gradients.add(weight, of_weight)
        if bias is not None and bias.requires_grad:
            ctx.gradients.add(bias, lambda: gradient.flatten(0, -2).sum(0))
        return gradient.matmul(values), None, None, None, None


_apply: Callable[..., Tensor] = _Linear.apply


def where_to_put() -> PutOffGradients | None:
    """Where a layer that runs forward now may put its weights' gradients; None: its backward pass computes them."""
    return _put_off if torch.is_grad_enabled() else None
