"""The router loss of a mixture of experts, over blocks on several stages.

Hugging Face multiplies two means over all tokens and all blocks (ModuleStub Transformer, arXiv 2101.03961, equations 4
to 6): a sum of losses per block would be another number. So each block adds to two sums, which travel with the
hidden state, and the head multiplies.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

Sums = tuple[Tensor, Tensor]
"""Sum of the routers' probabilities, float32 [experts], and number of tokens sent, int64 [experts]."""


class OtherRouterLossError(Exception):
    """The family's router loss can't be taken apart into sums of its blocks."""


@dataclass(frozen=True)
class RouterLoss:
    """What a family's own forward would add to its loss with ``output_router_logits``.

    Attributes:
        coefficient: what the loss is multiplied with (``router_aux_loss_coef``).
        experts: number of experts that a router chooses from.
        chosen: number of experts that a token is sent to.
        recorders: which modules' outputs are the routers' logits.
    """

    coefficient: float
    experts: int
    chosen: int
    recorders: tuple[OutputRecorder, ...]

    def start(self, device: torch.device) -> Sums:
        """Empty sums. The first needs a gradient, as everything does that one stage sends to the next."""
        probabilities = torch.zeros(self.experts, device=device, requires_grad=torch.is_grad_enabled())
        return probabilities, torch.zeros(self.experts, dtype=torch.int64, device=device)

    def add(self, sums: Sums, logits: list[Tensor]) -> Sums:
        """Add what the routers of a block said: each [tokens, experts]."""
        probabilities, counts = sums
        for each in logits:
            chances = torch.softmax(each, dim=-1)
            chosen = torch.topk(chances, self.chosen, dim=-1).indices.flatten()
            probabilities = probabilities + chances.float().sum(dim=0)
            counts = counts + torch.zeros_like(counts).scatter_add_(0, chosen, torch.ones_like(chosen))
        return probabilities, counts

    def loss(self, sums: Sums) -> Tensor:
        """The loss times its coefficient, a float32 scalar: of one micro-batch, as Hugging Face has it."""
        probabilities, counts = sums
        rows = counts.sum() / self.chosen  # tokens times blocks with a router
        rows = rows.clamp(min=1.0)
        return self.coefficient * self.experts * torch.sum((counts / rows) * (probabilities / rows))


class RouterLogitsRecorder:
    """Hears what the routers inside a block say while it runs."""

    def __init__(self, router: RouterLoss, path: str, block: nn.Module) -> None:
        self._heard: list[Tensor] | None = None
        for name, module in block.named_modules(prefix=path):
            for recorder in router.recorders:
                if _matches(recorder, name, module):
                    module.register_forward_hook(self._hook(recorder.index))

    def _hook(self, index: int) -> Any:
        def hear(module: nn.Module, args: Any, output: Any) -> None:
            said = output[index] if isinstance(output, tuple) else output
            if self._heard is not None and said is not None:
                self._heard.append(said)

        return hear

    @contextmanager
    def capture(self) -> Iterator[list[Tensor]]:
        """The logits that the block's routers give inside this context."""
        self._heard = []
        try:
            yield self._heard
        finally:
            self._heard = None


def router_loss_of(model: PreTrainedModel, config: PretrainedConfig) -> RouterLoss | None:
    """The router loss that ``config`` asks for with ``output_router_logits``; None if it asks for none.

    Raises:
        OtherRouterLossError: the family has a router loss of another kind.
    """
    if not getattr(config, "output_router_logits", False):
        return None
    family = vars(sys.modules[type(model).__module__]).get("load_balancing_loss_func")
    if family is None:  # transformers itself adds nothing to the loss of such a family
        return None
    recorders = _recorders(model)
    values: tuple[Any, ...] = (  # attributes of any type, looked at below
        router_coefficient(model),
        *(getattr(model, n, None) for n in ("num_experts", "num_experts_per_tok")),
    )
    if not recorders or not all(isinstance(value, int | float) for value in values):
        raise OtherRouterLossError
    coefficient, experts, chosen = values
    loss = RouterLoss(float(coefficient), int(experts), int(chosen), recorders)
    if not _agrees(loss, family):
        raise OtherRouterLossError
    return loss


def router_coefficient(model: PreTrainedModel) -> float | None:
    """What the family multiplies its router loss with; None where it has none."""
    names = ("router_aux_loss_coef", "aux_loss_coef")
    return next((getattr(model, name) for name in names if hasattr(model, name)), None)


def _recorders(model: PreTrainedModel) -> tuple[OutputRecorder, ...]:
    base: Any = model.base_model
    found = base.can_record_outputs.get("router_logits", [])
    found = found if isinstance(found, list) else [found]
    return tuple(
        each if isinstance(each, OutputRecorder) else OutputRecorder(each, index=1) for each in found
    )


def _matches(recorder: OutputRecorder, name: str, module: nn.Module) -> bool:
    of_class = recorder.target_class is not None and isinstance(module, recorder.target_class)
    of_name = recorder.class_name is not None and name.endswith(recorder.class_name)
    inside = recorder.layer_name is None or f".{recorder.layer_name.strip('.')}." in f"{name}."
    return (of_class or of_name) and inside


@torch.no_grad()
def _agrees(loss: RouterLoss, family: Any) -> bool:
    """Whether the family's own function gives the same number for made-up logits of two blocks."""
    if list(inspect.signature(family).parameters)[:3] != ["gate_logits", "num_experts", "top_k"]:
        return False
    random = torch.Generator().manual_seed(0)
    logits = [torch.randn(16, loss.experts, generator=random) for _ in range(2)]
    own = loss.loss(loss.add(loss.start(torch.device("cpu")), logits))
    theirs = loss.coefficient * family(tuple(logits), loss.experts, loss.chosen)
    return bool(torch.allclose(own, theirs, rtol=1e-5))
