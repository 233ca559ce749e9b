"""A model with an adapter's changes added to its weights, by PEFT itself: layer by layer, in fp32."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from dstrain.engine.checkpoint_files import SavedTensor
from dstrain.errors import DstrainError
from dstrain.lora import ADAPTER, base_name, is_adapter_parameter
from dstrain.model.adapters import Adapters
from dstrain.model.model_parts import ModelParts
from dstrain.model.pipeline_model import PipelineModel
from dstrain.model.weights.pretrained import PretrainedWeights

Model = PipelineModel | ModelParts
_WHOLE = f".modules_to_save.{ADAPTER}."


@dataclass(frozen=True)
class MergedTensor:
    """One parameter, which is computed when it is read."""

    shape: tuple[int, ...]
    compute: Callable[[], torch.Tensor]
    dtype: torch.dtype = torch.float32

    def read(self) -> torch.Tensor:
        """fp32, on CPU; good until another layer's is read."""
        return self.compute()


@dataclass(frozen=True)
class MergedParameter:
    """What `ExportedTensors` wants of a parameter: see `SavedParameter`."""

    weight: MergedTensor

    @property
    def most_precise(self) -> MergedTensor:
        return self.weight


class MergedState:
    """The parameters of a model with its adapter merged, as a `SavedState` has those of a checkpoint.

    A block, the embedding and the head are in memory at a time.

    Args:
        make: gives the model with its adapters, nothing of it built yet.
        adapter: gives the value of an adapter's parameter by its name in the model.
        folder: where the adapter lies, for messages.

    Raises:
        DstrainError: on reading: a layer can't be built, or the adapter lacks a parameter.
    """

    def __init__(
        self, make: Callable[[], Model], adapter: Callable[[str], torch.Tensor], folder: Path
    ) -> None:
        self.folder = folder
        self.buffers: Mapping[str, SavedTensor] = {}
        self._make = make
        self._adapter = adapter
        self._model = make()
        self._layers: dict[int, dict[str, torch.Tensor]] = {}
        self._built: dict[int, Any] = {}  # modules

    @cached_property
    def parameters(self) -> dict[str, MergedParameter]:
        """By Hugging Face name. A tied weight is there under each of its names."""
        return {
            name: MergedParameter(MergedTensor(shape, partial(self._read, index, name)))
            for index in range(self._model.num_layers)
            for name, shape in self._model.shapes_of(index).items()
        }

    def _read(self, index: int, name: str) -> torch.Tensor:
        if index not in self._layers:
            self._release()
            if index in self._built:  # read for a second time: layers are built once
                self._model = self._make()
                self._built.clear()
                self._layers.clear()
            self._built[index] = layer = self._model.build(index)
            self._merge(index, layer)
        return self._layers[index][name]

    def _release(self) -> None:
        """Give back the memory of blocks."""
        kept = {0, self._model.num_layers - 1} if isinstance(self._model, PipelineModel) else {0}
        for index in self._layers.keys() - kept:
            self._built[index].to("meta")
            del self._layers[index]

    @torch.no_grad()
    def _merge(self, index: int, layer: nn.Module) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        for name, parameter in layer.named_parameters():
            if is_adapter_parameter(name):
                parameter.copy_(self._value(name, parameter))
        for module in layer.modules():
            if isinstance(module, BaseTunerLayer):
                tuned: Any = module  # without types
                tuned.merge()
        found, whole = {}, {}
        for name, parameter in layer.named_parameters(remove_duplicate=False):
            if _WHOLE in name:
                whole[name.replace(_WHOLE, ".")] = parameter.detach()
            elif not is_adapter_parameter(name):
                found[base_name(name)] = parameter.detach()
        self._layers[index] = found | whole

    def _value(self, name: str, parameter: nn.Parameter) -> torch.Tensor:
        value = self._adapter(name)
        if value.shape != parameter.shape:
            raise DstrainError(
                f"the adapter's {name} is {list(value.shape)}, but {list(parameter.shape)} by its configuration",
                where=str(self.folder),
                hint="the adapter is of another model, or of other options",
            )
        return value


def model_maker(
    config: PretrainedConfig,
    adapters: Adapters,
    weights: PretrainedWeights | None,
    *,
    seed: int,
    splits: bool,
) -> Callable[[], Model]:
    """What gives `MergedState` its model, in fp32.

    Args:
        weights: None: they are drawn.
        splits: the model can be split into layers.
    """
    model_class = PipelineModel if splits else ModelParts
    return lambda: model_class(config, seed=seed, weights=weights, adapters=adapters)


def unties(config: PretrainedConfig, adapters: Adapters) -> bool:
    """Whether merging makes two weights of what is one in the model: of its embedding and its head one is changed."""
    if not getattr(config.get_text_config(decoder=True), "tie_word_embeddings", False):
        return False
    changed = {*adapters.modules, *adapters.whole, *(name.rpartition(".")[0] for name in adapters.parameters)}
    return not changed.isdisjoint(adapters.tied_modules)


def unquantized(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration of the same model with weights that are not quantized in its files."""
    other = copy.deepcopy(config)
    other.__dict__.pop("quantization_config", None)
    return other


def untied(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration of the same model with two weights of their own."""
    other = copy.deepcopy(config)
    for part in {id(part): part for part in (other, other.get_text_config(decoder=True))}.values():
        part.tie_word_embeddings = False
    return other
