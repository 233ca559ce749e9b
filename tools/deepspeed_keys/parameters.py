"""The parameters of DeepSpeed's optimizers and schedules: what the constructors behind each ``type`` take."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tools.deepspeed_keys.models import Node, as_json


def _adam() -> list[Any]:
    import torch
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    return [torch.optim.AdamW, FusedAdam, DeepSpeedCPUAdam, _taken_out_before]


def _taken_out_before(
    torch_adam: bool = False, adam_w_mode: bool = True, fp32_optimizer_states: bool = True
) -> None:
    """Parameters that DeepSpeed's engine takes out before it calls Adam (engine.py, get_optimizer_configuration)."""


def _sgd() -> list[Any]:
    import torch

    return [torch.optim.SGD]


def _adagrad() -> list[Any]:
    import torch

    return [torch.optim.Adagrad]


def _lamb() -> list[Any]:
    from deepspeed.ops.lamb import FusedLamb

    return [FusedLamb]


def _lion() -> list[Any]:
    from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion

    return [FusedLion, DeepSpeedCPULion]


def _schedule(name: str) -> Callable[[], list[Any]]:
    def classes() -> list[Any]:
        from deepspeed.runtime import lr_schedules

        return [getattr(lr_schedules, name)]

    return classes


# The classes whose signatures are the parameters of a type. (Muon's are shared out by the engine.)
OPTIMIZERS: dict[str, Callable[[], list[Any]]] = {
    "AdamW": _adam, "Adam": _adam, "SGD": _sgd, "Adagrad": _adagrad, "Lamb": _lamb, "Lion": _lion,
}  # fmt: skip
SCHEDULERS: dict[str, Callable[[], list[Any]]] = {
    name: _schedule(name)
    for name in ("LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR")
}


def parameters(makers: Mapping[str, Callable[[], list[Any]]]) -> Node:
    """The parameters that the classes behind ``type`` take, each with the names of the types that take it."""
    keys: dict[str, Node] = {}
    for name, classes in makers.items():
        for parameter in (p for each in classes() for p in _signature(each)):
            default = None if parameter.default is inspect.Parameter.empty else as_json(parameter.default)
            node = keys.setdefault(parameter.name, {"type": "any", "default": default, "of": []})
            if name not in node["of"]:
                node["of"].append(name)
    return {"keys": keys}


def _signature(maker: Any) -> Iterator[inspect.Parameter]:
    for parameter in inspect.signature(maker).parameters.values():
        ours = parameter.name in ("params", "model_params", "optimizer", "self")
        if not ours and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            yield parameter
