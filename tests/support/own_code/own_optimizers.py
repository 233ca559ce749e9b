"""Optimizers as a user may write them, outside of dstrain."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023, Symbolic Discovery of Optimization Algorithms, program 1."""

    def __init__(self, params: Iterable[Any], lr: float, betas: Any = (0.9, 0.99), weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state, (first, second) = self.state[parameter], group["betas"]
                average = state.setdefault("exp_avg", torch.zeros_like(parameter))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(group["lr"] * torch.lerp(parameter.grad, average, first).sign())
                average.lerp_(parameter.grad, 1 - second)


class Momentum(torch.optim.Optimizer):
    """An average of the gradients, without the bias of its beginning: it counts its steps."""

    def __init__(self, params: Iterable[Any], lr: float, beta: float = 0.9, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "beta": beta, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state, beta = self.state[parameter], group["beta"]
                state["count"] = state.get("count", 0) + 1
                average = state.setdefault("average", torch.zeros_like(parameter))
                average.lerp_(parameter.grad, 1 - beta)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(average, alpha=group["lr"] / (1 - beta ** state["count"]))


def slow_momentum(params: Iterable[Any], lr: float, weight_decay: float = 0.0) -> Momentum:
    """A function does as well as a class."""
    return Momentum(params, lr, beta=0.95, weight_decay=weight_decay)


class Factored(Momentum):
    """Its state has fewer numbers than the parameters: one layout can't share out what another has saved."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        super().step()
        for parameter, state in self.state.items():
            state["factor"] = parameter.flatten()[:3].clone()


class Odd(Momentum):
    """It keeps something that a checkpoint can't hold."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        super().step()
        for state in self.state.values():
            state["random"] = torch.Generator()


class WithoutDecay(torch.optim.Optimizer):
    """It takes no weight decay."""

    def __init__(self, params: Iterable[Any], lr: float, beta: float):
        super().__init__(params, {"lr": lr})


def nothing(params: Iterable[Any], lr: float, beta: float) -> str:
    """No optimizer at all."""
    return "nothing"
