"""Parameter groups, and an optimizer of the user's own in DeepSpeed's hands, which calls it a client optimizer.

DeepSpeed gives a client optimizer the model's parameters only with ZeRO-0. With ZeRO a parameter is a flat piece of an
fp32 copy of a whole group, and with ZeRO-3 a step is called once for each of these. So layouts train the same model as
long as it updates every number by itself, and keeps what it remembers in ``self.state[parameter]``: no norms or shapes
of parameters, no counter on itself.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dstrain.errors import DstrainError
from dstrain.lora import base_name


def hugging_face_name(name: str) -> str:
    """A parameter's name without the number of its layer in front, which only models in layers have, and without the
    adapter around it."""
    number, _, rest = name.partition(".")
    return base_name(rest if number.isdigit() else name)


def group_parameters(
    named: Iterable[tuple[str, nn.Parameter]], *, weight_decay: float, tied: Collection[str]
) -> list[dict[str, Any]]:
    """Optimizer groups, in an order that is the same on every stage; empty ones are left out.

    Norms and biases (fewer than two dimensions) do not decay. Each tied weight has a group of its
    own: ZeRO partitions group by group, so the copies on different stages are cut at the same places
    and their gradients can be summed slice by slice.

    Args:
        named: parameters of this stage by name; frozen ones are left out.
        tied: names of the parameters that are tied to another layer's.
    """
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    groups: list[dict[str, Any]] = []
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        if name in tied:
            groups.append({"name": f"tied {name}", "params": [parameter], "weight_decay": weight_decay})
        elif len(getattr(parameter, "ds_shape", parameter.shape)) >= 2:  # ZeRO-3 has emptied it
            decay.append(parameter)
        else:
            no_decay.append(parameter)
    groups.append({"name": "decay", "params": decay, "weight_decay": weight_decay})
    groups.append({"name": "no decay", "params": no_decay, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]


Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class ClientOptimizer:
    """Makes the optimizer for DeepSpeed's engine.

    Attributes:
        name: ``module:name``, for messages.
        make: a `torch.optim.Optimizer` class, or a function that returns one; takes parameter groups, ``lr`` and
            ``options``.
        options: keyword arguments, JSON values.
        lr: to begin with; each step sets that of every group.
        weight_decay: of the groups that decay.
    """

    name: str
    make: Callable[..., Any]
    options: Mapping[str, Any]
    lr: float
    weight_decay: float

    def __call__(self, groups: Groups) -> torch.optim.Optimizer:
        """The optimizer of these parameter groups, each of which has its own ``weight_decay``.

        Raises:
            DstrainError: it can't be made, is no optimizer, or does not take the learning rate or the decay.
        """
        try:
            optimizer = self.make(groups, lr=self.lr, **self.options)
        except Exception as error:
            traceback.print_exc()
            raise self._error(
                f"can't be made: {type(error).__name__}: {error}",
                "it is called with parameter groups, lr, and what optimizer_options holds",
            ) from error
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise self._error(
                f"is a {type(optimizer).__name__}, not a torch.optim.Optimizer",
                "name a class that is one, or a function that returns one",
            )
        if any("lr" not in group for group in optimizer.param_groups):
            raise self._error(
                "has no lr in its parameter groups",
                'pass {"lr": lr} to super().__init__, and read group["lr"]',
            )
        if self.weight_decay and "weight_decay" not in optimizer.defaults:
            raise self._error(
                f"takes no weight_decay, and the run has {self.weight_decay:g}",
                "--set weight_decay=0; or take it, and read group['weight_decay']",
            )
        return optimizer

    def refuse_what_a_checkpoint_cannot_hold(self, optimizer: torch.optim.Optimizer) -> None:
        """To be asked after a step. Raises DstrainError where it remembers more than tensors and plain values."""
        for state in (*optimizer.state.values(), *optimizer.param_groups):
            for key, value in state.items():
                if key != "params" and not _is_plain(value):
                    raise self._error(
                        f"keeps a {type(value).__name__} as {key!r}, which a checkpoint can't hold",
                        "keep tensors, numbers, texts, and lists or dicts of these",
                    )

    def _error(self, message: str, hint: str) -> DstrainError:
        return DstrainError(f"optimizer {self.name} {message}", hint=hint, exit_code=1)


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return type(value) is dict and all(_is_plain(each) for pair in value.items() for each in pair)
    if isinstance(value, list | tuple):
        return type(value) in (list, tuple) and all(map(_is_plain, value))
    return value is None or isinstance(value, torch.Tensor | bool | int | float | str)
