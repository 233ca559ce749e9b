"""Random initial weights that depend only on (seed, parameter name), never on the layout."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from typing import Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from dstrain.model.skeleton import untouched_rng


def module_seed(seed: int, name: str) -> int:
    """A 63-bit seed for the module with this Hugging Face name."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class Initialiser(Protocol):
    """What gives the modules below it their initial values: a Hugging Face model, or what stands for one."""

    def _init_weights(self, module: nn.Module) -> None: ...


def initialisers(model: PreTrainedModel) -> dict[str, Initialiser]:
    """Which (sub)model's ``_init_weights`` is responsible for each module, by module path."""
    owners: dict[str, Initialiser] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        parent = owners.get(path.rpartition(".")[0], model)
        owners[path] = module if isinstance(module, PreTrainedModel) else parent
    return owners


def materialise(module: nn.Module) -> None:
    """Give every meta parameter below ``module`` CPU memory; shared ones stay shared.

    The memory holds what the constructor set, where it set anything (see ``skeleton``), else it is
    uninitialised.
    """
    fresh: dict[int, nn.Parameter] = {}
    for child in module.modules():
        for name, param in child._parameters.items():
            if param is not None and param.is_meta:
                if id(param) not in fresh:
                    constructed = getattr(param, "constructed", None)
                    value = (
                        torch.empty(param.shape, dtype=param.dtype)
                        if constructed is None
                        else constructed.clone()
                    )
                    fresh[id(param)] = nn.Parameter(value, requires_grad=param.requires_grad)
                    fresh[id(param)].__dict__["constructed"] = constructed is not None
                    fresh[id(param)].__dict__["draw"] = getattr(param, "draw", None)
                child._parameters[name] = fresh[id(param)]


@torch.no_grad()
def initialise(
    path: str,
    module: nn.Module,
    owners: dict[str, Initialiser],
    seed: int,
    *,
    without: Collection[str] = (),
) -> list[str]:
    """Run the family's own ``_init_weights`` below ``module``, children first as Hugging Face does.

    Each module draws from a generator seeded with its own name. Global generators are left as they were.

    Args:
        without: paths of modules that have been initialised already, with all below them.

    Returns:
        The names, below ``module``, of parameters that neither the family nor its constructor gave a value.
    """
    done = tuple(f"{name}." for name in without)
    # An in-place write bumps a tensor's version: a parameter that nobody wrote to would hold whatever was
    # in memory.
    before = {
        name: param._version
        for name, param in module.named_parameters()
        if not f"{path}.{name}".lstrip(".").startswith(done)
    }
    with untouched_rng():
        for name, child in _children_first(path, module, without):
            torch.default_generator.manual_seed(module_seed(seed, name))
            owners[name]._init_weights(child)
    parameters = {name: param for name, param in module.named_parameters() if name in before}
    missed = [
        n for n, p in parameters.items() if p._version == before[n] and not p.__dict__.get("constructed")
    ]
    with untouched_rng():
        for name in missed:
            if draw := parameters[name].__dict__.get("draw"):  # what its constructor would have called
                torch.default_generator.manual_seed(module_seed(seed, f"{path}.{name}".lstrip(".")))
                draw(parameters[name])
    missed = [name for name in missed if not parameters[name].__dict__.get("draw")]
    for param in parameters.values():
        param.__dict__.pop("constructed", None)
        param.__dict__.pop("draw", None)
    return missed


@torch.no_grad()
def uninitialised(model: PreTrainedModel, owners: dict[str, Initialiser]) -> list[str]:
    """What ``initialise`` would find missing, told from the weightless model itself."""
    before = {name: param._version for name, param in model.named_parameters()}
    with untouched_rng():
        for name, child in _children_first("", model):
            try:
                owners[name]._init_weights(child)
            except (
                RuntimeError,
                NotImplementedError,
            ):  # it needs values, so it sets some: ``initialise`` will tell
                return []
    return [
        name
        for name, param in model.named_parameters()
        if param._version == before[name] and not {"constructed", "draw"} & param.__dict__.keys()
    ]


def cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast the fp32 parameters below ``module`` in place; others were given their type by the family."""
    for param in module.parameters():
        if param.dtype == torch.float32:
            param.data = param.data.to(dtype)


def _children_first(
    path: str, module: nn.Module, without: Collection[str] = ()
) -> Iterator[tuple[str, nn.Module]]:
    if path in without:
        return
    for name, child in module.named_children():
        yield from _children_first(f"{path}.{name}" if path else name, child, without)
    yield path, module
