"""A Hugging Face causal language model as pipeline layers: ``[embed, block 0, ..., head]``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig

from dstrain.errors import DstrainError
from dstrain.model.adapters import Adapters
from dstrain.model.initialise import cast, initialise, materialise
from dstrain.model.layers import ArgumentsCache, BlockLayer, EmbedLayer, HeadLayer, Layer
from dstrain.model.pipeline_split.probe import find_structure
from dstrain.model.weights.pretrained import PretrainedWeights, WeightLoader


@dataclass(frozen=True)
class TiedWeight:
    """One weight that several layers use.

    Attributes:
        key: its canonical Hugging Face name, e.g. ``model.embed_tokens.weight``.
        owners: (layer index, parameter path inside that layer), in the order of the layers.
    """

    key: str
    owners: tuple[tuple[int, str], ...]


class PipelineModel:
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
        adapters: what is trained in place of the parameters; None: these are.

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
        adapters: Adapters | None = None,
    ) -> None:
        structure = find_structure(config, attention)
        if structure.refusal:
            raise DstrainError(
                f"a {config.model_type} model cannot be split into pipeline layers: {structure.refusal}",
                hint="train it with one pipeline stage (ZeRO shards it over the GPUs)",
            )
        self.config = structure.config
        self.seed = seed
        self.dtype = dtype
        self.num_layers = structure.num_blocks + 2
        self.names = ("embed", *(f"block {i}" for i in range(structure.num_blocks)), "head")
        self.tied = tuple(TiedWeight(key, owners) for key, owners in structure.tied)
        self._structure = structure
        self._arguments = ArgumentsCache(structure.partial_forward)
        self._shared: dict[str, nn.Parameter] = {}
        self._built: set[int] = set()
        self._loader = self._open(weights) if weights else None
        self._adapters = adapters
        self.after_build: Callable[[nn.Module], None] = lambda layer: None

    def build(self, index: int) -> nn.Module:
        """Materialise layer ``index`` on CPU with its initial weights. Call it once for each local layer.

        A tied weight is one ``Parameter`` object in all layers that this instance builds, and an identical
        copy in other processes. No global random state is touched.

        Returns:
            ``EmbedLayer``, ``BlockLayer`` or ``HeadLayer``; its parameters are named as in Hugging Face, and with
            adapters as in PEFT.

        Raises:
            DstrainError: the family defines no initial value for one of the layer's parameters, or the
                pretrained weights do not hold it.
        """
        if not 0 <= index < self.num_layers:
            raise IndexError(f"layer {index} of {self.num_layers}")
        if index in self._built:
            raise ValueError(f"layer {index} was built already: its modules are in use")
        self._built.add(index)
        modules = self._structure.layer_modules(index)
        for path, module in modules.items():
            self._fill(path, module)
        self._tie(index, modules)
        if self._adapters is not None:
            modules = self._adapters.add(modules, stored=self._loader.quantized if self._loader else None)
            self._structure.replace_modules(modules)
        layer = self._layer(index, modules)
        self.after_build(layer)
        return layer

    def shapes_of(self, index: int) -> dict[str, tuple[int, ...]]:
        """The shapes of the model's own parameters in a layer that is not built yet, by Hugging Face name."""
        return {
            f"{path}.{name}": tuple(parameter.shape)
            for path, module in self._structure.layer_modules(index).items()
            for name, parameter in module.named_parameters(remove_duplicate=False)
        }

    def _layer(self, index: int, modules: dict[str, nn.Module]) -> Layer:
        if index == 0:
            return EmbedLayer(modules, self._structure.partial_forward, self._structure.router)
        if index == self.num_layers - 1:
            return HeadLayer(modules, self._structure.partial_forward, self._structure.router)
        return BlockLayer(modules, index - 1, self._arguments, self._structure.router)

    def router_sums(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        """The sums of the router loss as the first layer starts them; empty for a model without one."""
        router = self._structure.router
        return router.start(device) if router is not None else ()

    def to(self, device: torch.device | str) -> PipelineModel:
        """Move the buffers that belong to no layer (rotary tables); they follow the input's device anyway."""
        self._structure.partial_forward.to(device)
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
            with self._structure.restored():
                return self._loader.take([key, *sorted(names - {key})])
        path = next((p for p in modules if key.startswith(p + ".")), None)
        if path is not None:
            return modules[path].get_parameter(key[len(path) + 1 :])
        path = next(p for p in self._structure.module_stubs if key.startswith(p + "."))
        stranger: nn.Module = copy.deepcopy(self._structure.module_stubs[path].stub_twin)
        self._fill(path, stranger)
        return stranger.get_parameter(key[len(path) + 1 :])

    def _open(self, weights: PretrainedWeights) -> WeightLoader:
        """With the few buffers that the files hold and no layer does loaded at once."""
        with self._structure.restored():
            loader = weights.loader(self._structure.model, self.dtype)
            names = set(self._structure.model.state_dict())
            for index in range(self.num_layers):
                for path, module in self._structure.layer_modules(index).items():
                    names -= set(module.state_dict(prefix=f"{path}."))
            loader.load(names)
        return loader

    def _fill(self, path: str, module: nn.Module) -> None:
        if self._loader:
            tied = {name for weight in self.tied for _, name in weight.owners}
            with self._structure.restored():
                self._loader.load(set(module.state_dict(prefix=f"{path}.")) - tied)
            return
        materialise(module)
        with self._structure.restored():  # some families look up where in the model a module stands
            missed = initialise(path, module, self._structure.owners, self.seed)
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
