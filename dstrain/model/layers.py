"""A Hugging Face causal language model as the layers of a pipeline: ``[embed, block 0, ..., head]``."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig

from dstrain.errors import DstrainError
from dstrain.model.asked import Asked
from dstrain.model.buffers import keep_buffer_types
from dstrain.model.dissection.driver import Call, Driver
from dstrain.model.dissection.probe import dissect
from dstrain.model.initialise import cast, initialise, materialise
from dstrain.model.loss import TokenLoss
from dstrain.model.router import RouterEars, RouterLoss
from dstrain.model.weights.pretrained import PretrainedWeights, WeightLoader

State = tuple[Tensor, ...]
"""What one layer hands to the next: (hidden [B, S, H], position_ids int64 [B, S]), and with a router loss its sums
(float32 [experts], int64 [experts])."""


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
        weights: where to take the parameters from instead of drawing them; each layer that is built reads its own.
        attention: attention implementation: "sdpa", "eager", "flash_attention_2" ..., or
            "auto": sdpa where the family has it, else eager.

    Attributes:
        num_layers: blocks + 2.
        names: "embed", "block 0", ..., "head".
        tied: the weights that more than one layer uses.
        after_build: called with each layer as soon as its parameters have their values.

    Raises:
        DstrainError: the family cannot be split into layers without changing what it computes, with the
            reason; or ``weights`` are not its own.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        *,
        seed: int,
        dtype: torch.dtype = torch.float32,
        attention: str = "sdpa",
        weights: PretrainedWeights | None = None,
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
        self._loader = self._open(weights) if weights else None
        self.after_build: Callable[[nn.Module], None] = lambda layer: None

    def build(self, index: int) -> nn.Module:
        """Materialise layer ``index`` on CPU with its initial weights. Call it once for each local layer.

        A tied weight is one ``Parameter`` object in all layers that this instance builds, and an identical
        copy in other processes. No global random state is touched.

        Returns:
            ``EmbedLayer``, ``BlockLayer`` or ``HeadLayer``; its parameters are named as in Hugging Face.

        Raises:
            DstrainError: the family defines no initial value for one of the layer's parameters, or the
                pretrained weights do not hold it.
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
        layer = self._layer(index, modules)
        self.after_build(layer)
        return layer

    def _layer(self, index: int, modules: dict[str, nn.Module]) -> Layer:
        if index == 0:
            return EmbedLayer(modules, self._anatomy.driver, self._anatomy.router)
        if index == self.num_layers - 1:
            return HeadLayer(modules, self._anatomy.driver, self._anatomy.router)
        return BlockLayer(modules, index - 1, self._arguments, self._anatomy.router)

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
        """The tied weight as its canonical owner initialises it, or as the files hold it under any of its names."""
        if self._loader:
            [names] = [{path for _, path in weight.owners} for weight in self.tied if weight.key == key]
            with self._anatomy.restored():
                return self._loader.take([key, *sorted(names - {key})])
        path = next((p for p in modules if key.startswith(p + ".")), None)
        if path is not None:
            return modules[path].get_parameter(key[len(path) + 1 :])
        path = next(p for p in self._anatomy.switches if key.startswith(p + "."))
        stranger = copy.deepcopy(self._anatomy.switches[path]._twin)
        self._fill(path, stranger)
        return stranger.get_parameter(key[len(path) + 1 :])

    def _open(self, weights: PretrainedWeights) -> WeightLoader:
        """With the few buffers that the files hold and no layer does loaded at once."""
        with self._anatomy.restored():
            loader = weights.loader(self._anatomy.model, self.dtype)
            names = set(self._anatomy.model.state_dict())
            for index in range(self.num_layers):
                for path, module in self._anatomy.layer_modules(index).items():
                    names -= set(module.state_dict(prefix=f"{path}."))
            loader.load(names)
        return loader

    def _fill(self, path: str, module: nn.Module) -> None:
        if self._loader:
            tied = {name for weight in self.tied for _, name in weight.owners}
            with self._anatomy.restored():
                self._loader.load(set(module.state_dict(prefix=f"{path}.")) - tied)
            return
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
    """(input_ids int64 [B, S], position_ids int64 [B, S]) -> State."""

    def __init__(self, modules: dict[str, nn.Module], driver: Driver, router: RouterLoss | None) -> None:
        super().__init__(modules)
        self._driver = driver
        self._router = router

    def forward(self, inputs: tuple[Tensor, Tensor]) -> State:
        input_ids, position_ids = inputs
        hidden = self._driver.prologue(input_ids, position_ids, training=self.training)
        sums = self._router.start(hidden.device) if self._router else ()
        return hidden, position_ids, *sums


class BlockLayer(Layer):
    """State -> State."""

    def __init__(
        self, modules: dict[str, nn.Module], number: int, arguments: ArgumentsCache, router: RouterLoss | None
    ) -> None:
        super().__init__(modules)
        # Past nn.Module.__setattr__, which would register the block under a second name.
        [(path, self.__dict__["_block"])] = modules.items()
        self._number = number
        self._arguments = arguments
        self._router = router
        self._ears = RouterEars(router, path, self._block) if router else None

    def forward(self, state: State) -> State:
        hidden, position_ids, *sums = state
        call = self._arguments(hidden, position_ids)[self._number]
        if self._router is None:
            return _hidden_of(call.apply(self._block, hidden)), position_ids
        with self._ears.listening() as logits:
            output = call.apply(self._block, hidden)
        return _hidden_of(output), position_ids, *self._router.add(tuple(sums), logits)


def _hidden_of(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple | list) else output


class HeadLayer(Asked, Layer):
    """State -> logits [B, S, V], or what it is asked for.

    The loss is the sum of the tokens' cross-entropies times the weight, and in training the router loss.
    """

    def __init__(self, modules: dict[str, nn.Module], driver: Driver, router: RouterLoss | None) -> None:
        super().__init__(modules)
        self._driver = driver
        self._router = router
        self._loss = TokenLoss()

    def forward(self, state: State) -> Tensor:
        hidden, position_ids, *sums = state
        if self.target is not None:
            loss = self._token_loss(hidden, position_ids, *self.target)
            return loss + self._router.loss(tuple(sums)) if self._router and self.training else loss
        if self.position is not None:
            row, place = self.position
            one = slice(row, row + 1), slice(place, place + 1)
            return self._logits(hidden[one], position_ids[one])[0, 0]
        return self._logits(hidden, position_ids)

    def _logits(self, hidden: Tensor, position_ids: Tensor) -> Tensor:
        return self._driver.epilogue(hidden, position_ids, training=self.training)

    def _token_loss(self, hidden: Tensor, position_ids: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
        """In chunks of tokens: a chunk's logits live only while its loss, or its gradient, is computed.

        Each chunk runs the family's own epilogue, with its scaling and soft-capping.
        """
        if not 0 < self.loss_chunk < labels.numel():
            return self._loss(self._logits(hidden, position_ids), (labels, weight))

        def part(hidden: Tensor, position_ids: Tensor, labels: Tensor) -> Tensor:
            return self._loss(self._logits(hidden, position_ids), (labels, weight))

        rows = (tensor.flatten(0, 1).split(self.loss_chunk) for tensor in (hidden, position_ids, labels))
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for chunk in zip(*rows, strict=True):
            total = total + checkpoint(part, *(tensor[None] for tensor in chunk), use_reentrant=False)
        return total


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
