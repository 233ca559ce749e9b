"""A Hugging Face causal language model as the layers of a pipeline: ``[embed, block 0, ..., head]``."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from dstrain.errors import DstrainError
from dstrain.model.buffers import keep_buffer_types
from dstrain.model.driver import Call, Driver
from dstrain.model.initialise import cast, initialise, materialise
from dstrain.model.probe import dissect

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class TiedWeight:
    """One weight that several layers use.

    Attributes:
        key: its canonical Hugging Face name, e.g. ``model.embed_tokens.weight``.
        owners: (layer index, parameter path inside that layer), in the order of the layers.
    """

    key: str
    owners: tuple[tuple[int, str], ...]


class LayeredModel:
    """The layers of a model, to be materialised one by one on the ranks that need them.

    Every layer drives one shared skeleton of the whole model, which is registered in none of them:
    parameters that are not local stay on meta. Modules may be moved and cast in place after ``build``
    (``module.to``, ``p.data = ``), but not replaced at the top of a layer.

    Args:
        config: of a causal language model, as ``load_config`` gives it; it is copied.
        seed: of the initial weights, which depend on it and on the parameter's name only.
        dtype: of the parameters. They are drawn in fp32 and rounded.
        attention: attention implementation: "sdpa", "eager", "flash_attention_2" ..., or
            "auto": sdpa where the family has it, else eager.

    Attributes:
        num_layers: blocks + 2.
        names: "embed", "block 0", ..., "head".
        tied: the weights that more than one layer uses.

    Raises:
        DstrainError: the family cannot be split into layers without changing what it computes, with the
            reason.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        *,
        seed: int,
        dtype: torch.dtype = torch.float32,
        attention: str = "sdpa",
    ) -> None:
        anatomy = dissect(config, attention)
        if anatomy.refusal:
            raise DstrainError(
                f"a {config.model_type} model cannot be split into pipeline layers: {anatomy.refusal}",
                hint="train it with one pipeline stage (ZeRO shards it over the GPUs)",
            )
        self.config = anatomy.config
        self.seed = seed
        self.dtype = dtype
        self.num_layers = anatomy.num_blocks + 2
        self.names = ("embed", *(f"block {i}" for i in range(anatomy.num_blocks)), "head")
        self.tied = tuple(TiedWeight(key, owners) for key, owners in anatomy.tied)
        self._anatomy = anatomy
        self._arguments = ArgumentsCache(anatomy.driver)
        self._shared: dict[str, nn.Parameter] = {}
        self._built: set[int] = set()

    def build(self, index: int) -> nn.Module:
        """Materialise layer ``index`` on CPU with its initial weights. Call it once for each local layer.

        A tied weight is one ``Parameter`` object in all layers that this instance builds, and an identical
        copy in other processes. No global random state is touched.

        Returns:
            ``EmbedLayer``, ``BlockLayer`` or ``HeadLayer``; its parameters are named as in Hugging Face.

        Raises:
            DstrainError: the family defines no initial value for one of the layer's parameters.
        """
        if not 0 <= index < self.num_layers:
            raise IndexError(f"layer {index} of {self.num_layers}")
        if index in self._built:
            raise ValueError(f"layer {index} was built already: its modules are in use")
        self._built.add(index)
        modules = self._anatomy.layer_modules(index)
        for path, module in modules.items():
            self._fill(path, module)
        self._tie(index, modules)
        if index == 0:
            return EmbedLayer(modules, self._anatomy.driver)
        if index == self.num_layers - 1:
            return HeadLayer(modules, self._anatomy.driver)
        return BlockLayer(modules, index - 1, self._arguments)

    def to(self, device: torch.device | str) -> LayeredModel:
        """Move the buffers that belong to no layer (rotary tables); they follow the input's device anyway."""
        self._anatomy.driver.to(device)
        return self

    def _tie(self, index: int, modules: dict[str, nn.Module]) -> None:
        for weight in self.tied:
            for owner, path in weight.owners:
                if owner == index:
                    if weight.key not in self._shared:
                        self._shared[weight.key] = self._canonical(weight.key, modules)
                    set_parameter(modules, path, self._shared[weight.key])

    def _canonical(self, key: str, modules: dict[str, nn.Module]) -> nn.Parameter:
        """The tied weight as its canonical owner initialises it."""
        path = next((p for p in modules if key.startswith(p + ".")), None)
        if path is not None:
            return modules[path].get_parameter(key[len(path) + 1 :])
        path = next(p for p in self._anatomy.switches if key.startswith(p + "."))
        stranger = copy.deepcopy(self._anatomy.switches[path]._twin)
        self._fill(path, stranger)
        return stranger.get_parameter(key[len(path) + 1 :])

    def _fill(self, path: str, module: nn.Module) -> None:
        materialise(module)
        with self._anatomy.restored():  # some families look up where in the model a module stands
            missed = initialise(path, module, self._anatomy.owners, self.seed)
        if missed:
            raise DstrainError(
                f"the {self.config.model_type} family defines no initial value for {path}.{missed[0]}",
                hint="use another model family",
            )
        cast(module, self.dtype)


def set_parameter(modules: dict[str, nn.Module], path: str, parameter: nn.Parameter) -> None:
    """Put ``parameter`` at the Hugging Face name ``path`` of a layer's modules."""
    root = next(p for p in modules if path.startswith(p + "."))
    inner, _, name = path[len(root) + 1 :].rpartition(".")
    modules[root].get_submodule(inner)._parameters[name] = parameter


class Layer(nn.Module):
    """Holds modules at their Hugging Face names, and keeps the precision of their buffers.

    ``forward`` takes one tuple, as DeepSpeed's ``PipelineModule`` calls its layers.
    """

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        super().__init__()
        for path, module in modules.items():
            parent: nn.Module = self
            *parts, name = path.split(".")
            for part in parts:
                if part not in parent._modules:
                    parent.add_module(part, nn.Module())
                parent = parent._modules[part]  # type: ignore[assignment]
            parent.add_module(name, module)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Layer:
        return keep_buffer_types(self, lambda: super(Layer, self)._apply(fn, recurse))


class EmbedLayer(Layer):
    """(input_ids int64 [B, S], position_ids int64 [B, S]) -> (hidden [B, S, H], position_ids)."""

    def __init__(self, modules: dict[str, nn.Module], driver: Driver) -> None:
        super().__init__(modules)
        self._driver = driver

    def forward(self, inputs: Pair) -> Pair:
        input_ids, position_ids = inputs
        return self._driver.prologue(input_ids, position_ids, training=self.training), position_ids


class BlockLayer(Layer):
    """(hidden [B, S, H], position_ids int64 [B, S]) -> (hidden [B, S, H], position_ids)."""

    def __init__(self, modules: dict[str, nn.Module], number: int, arguments: ArgumentsCache) -> None:
        super().__init__(modules)
        # Past nn.Module.__setattr__, which would register the block under a second name.
        self.__dict__["_block"] = next(iter(modules.values()))
        self._number = number
        self._arguments = arguments

    def forward(self, inputs: Pair) -> Pair:
        hidden, position_ids = inputs
        call = self._arguments(hidden, position_ids)[self._number]
        output = call.apply(self._block, hidden)
        return (output[0] if isinstance(output, tuple | list) else output), position_ids


class HeadLayer(Layer):
    """(hidden [B, S, H], position_ids int64 [B, S]) -> logits [B, S, V]."""

    def __init__(self, modules: dict[str, nn.Module], driver: Driver) -> None:
        super().__init__(modules)
        self._driver = driver

    def forward(self, inputs: Pair) -> Tensor:
        hidden, position_ids = inputs
        return self._driver.epilogue(hidden, position_ids, training=self.training)


class ArgumentsCache:
    """The blocks' arguments for the last position tensors: a stage computes them once a micro-batch.

    Keyed by the tensor's storage and version; an entry keeps that tensor alive, since a freed storage is
    reused at the same address. Two entries serve a stage that runs one forward and one recomputation
    alternately; more would keep more attention masks ([B, 1, S, S]). A receive that writes into a buffer
    behind autograd's back does not bump the version: hand the layers a clone, as DeepSpeed's engine does.
    """

    SIZE = 2

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._entries: OrderedDict[tuple[Any, ...], tuple[Tensor, list[Call]]] = OrderedDict()

    def __call__(self, hidden: Tensor, position_ids: Tensor) -> list[Call]:
        # Inference tensors have no version and may not be saved for a later backward; meta ones have no
        # address.
        if torch.is_inference_mode_enabled() or position_ids.is_inference() or position_ids.is_meta:
            return self._driver.arguments(hidden, position_ids)
        key = (
            position_ids.untyped_storage().data_ptr(),
            position_ids.storage_offset(),
            position_ids.shape,
            position_ids.stride(),
            position_ids.dtype,
            position_ids.device,
            position_ids._version,
            torch.is_autocast_enabled(position_ids.device.type),
            hidden.dtype,
            hidden.shape,
        )
        if key in self._entries:
            self._entries.move_to_end(key)
        else:
            self._entries[key] = (position_ids, self._driver.arguments(hidden, position_ids))
            while len(self._entries) > self.SIZE:
                self._entries.popitem(last=False)
        return self._entries[key][1]
