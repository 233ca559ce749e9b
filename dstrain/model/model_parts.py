"""A model that can't be split into pipeline layers, part by part: its weights, and not what it computes.

A part is a block that shares no parameter with anything else; the first one is all that is in none of those.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from dstrain.errors import DstrainError
from dstrain.model.adapters import Adapters
from dstrain.model.initialise import Initialiser, cast, initialise, initialisers, materialise
from dstrain.model.pipeline_split.structure import Refused, find_blocks
from dstrain.model.skeleton import empty_model, put_at_paths, untouched_rng
from dstrain.model.weights.pretrained import PretrainedWeights, WeightLoader
from dstrain.model.weights.quantized_weights import QuantizedWeights


class ModelParts:
    """The parts of a model, each with its adapters: to be built once, in any order.

    Args:
        config, seed, dtype, weights, adapters: as for ``PipelineModel``.

    Raises:
        DstrainError: the model can't be built, or the weights are not its own.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        *,
        seed: int,
        dtype: torch.dtype = torch.float32,
        weights: PretrainedWeights | None = None,
        adapters: Adapters | None = None,
    ) -> None:
        self._model = empty_model(config)
        self._values = values_of(self._model, seed, dtype, weights)
        self._adapters = adapters
        self._paths = list(self._values.blocks)
        self.num_layers = 1 + len(self._paths)

    def shapes_of(self, index: int) -> dict[str, tuple[int, ...]]:
        """The shapes of the model's own parameters in a part that is not built yet, by Hugging Face name."""
        part = self._part(index)
        return {name: tuple(p.shape) for name, p in part.named_parameters(remove_duplicate=False)}

    def build(self, index: int) -> nn.Module:
        """A module whose parameters have their Hugging Face names, and values.

        Raises:
            DstrainError: a parameter gets no value.
        """
        if index == 0:
            self._values.fill_rest()
        else:
            self._values.fill_block(self._paths[index - 1])
        part = self._part(index)
        if self._adapters is not None:
            added = self._adapters.add(dict(part.named_children()), stored=self._values.quantized)
            put_at_paths(part, added)
        return part

    def _part(self, index: int) -> nn.Module:
        """What is built, at its path in a model of its own."""
        if index == 0:
            return outside(self._model, self._values.blocks)
        part, path = nn.Module(), self._paths[index - 1]
        put_at_paths(part, {path: self._values.blocks[path]})
        return part


def values_of(
    model: PreTrainedModel, seed: int, dtype: torch.dtype, weights: PretrainedWeights | None
) -> DrawnValues | LoadedValues:
    """Where the parameters of ``model``, which are on meta, get their values from."""
    if weights is not None:
        return LoadedValues(model, weights.loader(model, dtype))
    return DrawnValues(model, seed, dtype)


class DrawnValues:
    """Initial values, those that the model's layers would have.

    Attributes:
        blocks: those that are filled one by one, by path.
        quantized: weights that are not filled, since they are quantized in the files; None of drawn values.
    """

    quantized: QuantizedWeights | None = None

    def __init__(self, model: PreTrainedModel, seed: int, dtype: torch.dtype) -> None:
        self._model = model
        self._seed = seed
        self._dtype = dtype
        self._owners = initialisers(model)
        self.blocks = lonely_blocks(model)
        if _set_from_outside(model, self._owners, self.blocks):
            self.blocks = {}

    def fill_block(self, path: str) -> None:
        """Raises DstrainError where the family has no value for one of its parameters."""
        block = self.blocks[path]
        materialise(block)
        self._refuse(initialise(path, block, self._owners, self._seed))
        cast(block, self._dtype)

    def fill_rest(self) -> None:
        """All that is in none of the blocks. Raises DstrainError likewise."""
        rest = outside(self._model, self.blocks)
        materialise(rest)
        self._refuse(initialise("", self._model, self._owners, self._seed, without=set(self.blocks)))
        # A tied weight was just drawn once by each of its owners; the last word is the canonical one's.
        tied = set(getattr(self._model, "all_tied_weights_keys", {}).values())
        for path in sorted({key.rpartition(".")[0] for key in tied}):
            initialise(path, self._model.get_submodule(path), self._owners, self._seed)
        cast(rest, self._dtype)

    def _refuse(self, missed: list[str]) -> None:
        if missed:
            raise DstrainError(
                f"the {self._model.config.model_type} family defines no initial value for {missed[0]}",
                hint="use another model family",
            )


class LoadedValues:
    """Pretrained values. Attributes as of `DrawnValues`."""

    def __init__(self, model: PreTrainedModel, loader: WeightLoader) -> None:
        self._loader = loader
        self.quantized = loader.quantized
        self.blocks = lonely_blocks(model)
        self._own = {path: set(block.state_dict(prefix=f"{path}.")) for path, block in self.blocks.items()}
        self._rest = set(model.state_dict()).difference(*self._own.values())

    def fill_block(self, path: str) -> None:
        """Raises DstrainError as ``WeightLoader.load`` does."""
        self._loader.load(self._own[path])

    def fill_rest(self) -> None:
        """Raises DstrainError likewise."""
        self._loader.load(self._rest)


def lonely_blocks(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The blocks that share no parameter with anything outside them, by path: they can be built one by one."""
    try:
        path, blocks = find_blocks(model, model.config)
    except Refused:
        return {}
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    found = {}
    for index, block in enumerate(blocks):
        inside = Counter(id(parameter) for _, parameter in block.named_parameters(remove_duplicate=False))
        if all(uses[key] == count for key, count in inside.items()):
            found[f"{path}.{index}"] = block
    return found


def outside(model: nn.Module, blocks: Mapping[str, nn.Module]) -> nn.Module:
    """What of a model is in none of these blocks: its very modules, but for other containers above the blocks."""
    above = _above(blocks)

    def without(module: nn.Module, path: str) -> nn.Module:
        if path not in above:
            return module
        container = nn.Module()
        container._parameters, container._buffers = module._parameters, module._buffers
        for name, child in module.named_children():
            inner = f"{path}.{name}" if path else name
            if inner not in blocks:
                container.add_module(name, without(child, inner))
        return container

    return without(model, "")


def _above(blocks: Mapping[str, nn.Module]) -> set[str]:
    return {path.rsplit(".", cut)[0] for path in blocks for cut in range(1, path.count(".") + 1)} | {""}


@torch.no_grad()
def _set_from_outside(
    model: PreTrainedModel, owners: dict[str, Initialiser], blocks: Mapping[str, nn.Module]
) -> bool:
    """Whether the family sets values in a block when a container of all of them is initialised."""
    before = [parameter._version for parameter in model.parameters()]
    try:
        with untouched_rng():
            for path in _above(blocks):
                owners[path]._init_weights(model.get_submodule(path))
    except (RuntimeError, NotImplementedError):  # it needs values, so it sets some
        return True
    return before != [parameter._version for parameter in model.parameters()]
