"""Parameter groups: with and without weight decay, and tied weights."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from torch import nn


def hugging_face_name(name: str) -> str:
    """A parameter's name without the number of its layer in front, which only models in layers have."""
    number, _, rest = name.partition(".")
    return rest if number.isdigit() else name


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
