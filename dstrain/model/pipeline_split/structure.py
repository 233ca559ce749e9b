"""The structure of a Hugging Face model: its blocks, its other weights, and shared weights."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from dstrain.model.adapters import Adapters
from dstrain.model.initialise import Initialiser, initialisers, uninitialised
from dstrain.model.pipeline_split.partial_forward import BlockStub, ModuleStub, PartialForward, meta_twin
from dstrain.model.quantization import elements
from dstrain.model.router import RouterLoss
from dstrain.model.skeleton import empty_model, untouched_rng


class Refused(Exception):  # noqa: N818 - caught by the probe, which hands on the reason
    """This model cannot be split into layers; the message is the reason, for the user."""


class OuterInitialiser:
    """Initialises a module as its own model does, and then as the container around it does.

    The container reaches one module only, so what it draws depends on no other layer: draws for weights on meta,
    those of layers that are not here, use no random numbers.
    """

    def __init__(self, inner: Initialiser, outer: Initialiser, container: nn.Module) -> None:
        self._inner, self._outer, self._container = inner, outer, container

    def _init_weights(self, module: nn.Module) -> None:
        self._inner._init_weights(module)
        self._outer._init_weights(self._container)


class ModelStructure:
    """A skeleton taken apart, with stand-ins in the places of all modules that own weights.

    Attributes:
        blocks: (Hugging Face path, module) of each decoder block.
        module_stubs: the stand-ins of the other modules with weights, by path.
        in_head: the paths of those that the head layer holds; the embedding layer holds the others.
        tied: (key, ((layer index, Hugging Face name), ...)) of weights that two layers use.
        hidden: the shape of a token's hidden state, [H] or, for hyper-connections, [streams, H].
        beside: what stands for the values that a block returns beside the hidden state, see ``probe.OpaqueOutput``.
        owners: whose ``_init_weights`` initialises the module at a path.
        router: the router loss that its blocks add to, or None.
        refusal: why the model cannot be split, or None.
    """

    def __init__(self, config: PretrainedConfig, attention: str | None) -> None:
        self.model: PreTrainedModel = empty_model(config, attention)
        self.config: PretrainedConfig = self.model.config
        self.owners = initialisers(self.model)
        self.total_parameters = sum(p.numel() for p in self.model.parameters())
        self.partial_forward = PartialForward(self.model, self.config, takes_positions(self.model))
        self.blocks: list[tuple[str, nn.Module]] = []
        self.module_stubs: dict[str, ModuleStub] = {}
        self.in_head: set[str] = set()
        self.tied: list[tuple[str, tuple[tuple[int, str], ...]]] = []
        self.router: RouterLoss | None = None
        self.hidden: tuple[int, ...] = (getattr(self.config, "hidden_size", 0),)
        self.beside: tuple[Any, ...] = ()
        self.refusal: str | None = None
        self._places: list[tuple[nn.Module, str, BlockStub | ModuleStub]] = []

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)

    def layer_modules(self, index: int) -> dict[str, nn.Module]:
        """The real modules of a layer by Hugging Face path (layer 0: embeddings, last: head)."""
        if 0 < index <= self.num_blocks:
            path, block = self.blocks[index - 1]
            return {path: block}
        head = index > 0
        return {path: s.stub_real for path, s in self.module_stubs.items() if (path in self.in_head) == head}

    def layer_of(self, path: str) -> int:
        """The layer that holds the module at ``path`` (a block or a module stub)."""
        if path in self.module_stubs:
            return self.num_blocks + 1 if path in self.in_head else 0
        return 1 + [p for p, _ in self.blocks].index(path)

    def take_apart(self) -> None:
        """Find the blocks and put the stand-ins in place.

        Raises:
            Refused: no list of blocks, or weights that cannot be given to a layer.
        """
        path, blocks = find_blocks(self.model, self.config)
        self.blocks = [(f"{path}.{i}", block) for i, block in enumerate(blocks)]
        self.partial_forward.count = len(self.blocks)
        spine = [path.rsplit(".", cut)[0] if cut else path for cut in range(path.count(".") + 1)] + [""]
        in_the_way = self._outer_initialisers(spine)
        self._replace(self.model, "", set(spine))
        for i, (_, block) in enumerate(self.blocks):
            self._stand_in(blocks, str(i), BlockStub(self.partial_forward, i, block))
        stranded = [name for name, _ in self.model.named_parameters()]
        if stranded:
            raise Refused(f"its weight {stranded[0]} belongs to no layer")
        if in_the_way:
            raise Refused(in_the_way)

    def _stand_in(self, parent: nn.Module, name: str, stand_in: BlockStub | ModuleStub) -> None:
        parent._modules[name] = stand_in
        self._places.append((parent, name, stand_in))

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Put the real modules back for a while, for code that walks through the whole model."""
        for parent, name, stand_in in self._places:
            parent._modules[name] = stand_in.stub_real
        try:
            yield
        finally:
            for parent, name, stand_in in self._places:
                parent._modules[name] = stand_in

    def replace_modules(self, modules: Mapping[str, nn.Module]) -> None:
        """Let other modules be the real ones at these paths: they compute the same shapes."""
        for path, module in modules.items():
            if path in self.module_stubs:
                self.module_stubs[path].__dict__["stub_real"] = module

    def add_adapters(self, adapters: Adapters) -> None:
        """Put adapters without data into the whole model, to measure it."""
        with self.restored():
            adapters.add_to_model(self.model, without_data=True)
            for parent, name, stand_in in self._places:
                stand_in.__dict__["stub_real"] = parent._modules[name]
                if isinstance(stand_in, ModuleStub):
                    stand_in.__dict__["stub_twin"] = meta_twin(stand_in.stub_real)
            self.total_parameters = sum(elements(p) for p in self.model.parameters())

    @torch.no_grad()
    def _outer_initialisers(self, spine: list[str]) -> str | None:
        """Layers are initialised one by one; where a container has a say in one module's values, it is noted.

        Returns:
            Why the layers cannot be initialised one by one, or None.
        """
        tied = getattr(self.model, "all_tied_weights_keys", {})
        tied = {*tied, *tied.values()}  # their canonical owner has the last word anyway
        for path in spine:
            before = {name: param._version for name, param in self.model.named_parameters()}
            container = self.model.get_submodule(path)
            with untouched_rng():
                self.owners[path]._init_weights(container)
            changed = [name for name, p in self.model.named_parameters() if p._version != before[name]]
            changed = [name for name in changed if name not in tied]
            if len({name.rpartition(".")[0] for name in changed}) > 1:
                return f"the initial value of {changed[0]} is set from outside its layer"
            for module in {name.rpartition(".")[0] for name in changed} - {path}:
                self.owners[module] = OuterInitialiser(self.owners[module], self.owners[path], container)
        if missed := uninitialised(self.model, self.owners):
            return f"its family defines no initial value for {missed[0]}"
        return None

    def _replace(self, module: nn.Module, path: str, spine: set[str]) -> None:
        self.partial_forward.loose.append(module)
        if path and path == max(spine, key=len):
            return
        for name, child in list(module.named_children()):
            below = f"{path}.{name}" if path else name
            container = isinstance(child, nn.ModuleList | nn.ModuleDict)
            if below in spine or container or not any(True for _ in child.parameters()):
                self._replace(child, below, spine)
            else:
                stub = ModuleStub(self.partial_forward, below, child)
                self._stand_in(module, name, stub)
                self.module_stubs[below] = stub

    def find_tied(self) -> None:
        """Fill ``tied``.

        Raises:
            Refused: a block shares weights, or two modules of one layer do.
        """
        places: dict[int, list[tuple[str, str]]] = {}
        for root, module in self._roots():
            seen: set[int] = set()
            for name, param in module.named_parameters(prefix=root):
                if id(param) not in seen:
                    seen.add(id(param))
                    places.setdefault(id(param), []).append((root, name))
        sources = set(getattr(self.model, "all_tied_weights_keys", {}).values())
        for uses in places.values():
            if len(uses) < 2:
                continue
            owners = sorted((self.layer_of(root), name) for root, name in uses)
            if any(0 < index <= self.num_blocks for index, _ in owners):
                raise Refused(
                    f"{owners[0][1]} and {owners[1][1]} are one weight, and one of them is a block's"
                )
            if len({index for index, _ in owners}) < len(owners):
                raise Refused(f"{owners[0][1]} and {owners[1][1]} are one weight in one layer")
            names = [name for _, name in owners]
            self.tied.append((next((n for n in names if n in sources), names[0]), tuple(owners)))

    def modules_of_blocks(self) -> list[list[tuple[str, type[nn.Module]]]]:
        """What each block consists of, to see whether a forward changes that."""
        return [[(name, type(child)) for name, child in block.named_modules()] for _, block in self.blocks]

    def _roots(self) -> Iterator[tuple[str, nn.Module]]:
        yield from ((path, stub.stub_real) for path, stub in self.module_stubs.items())
        yield from self.blocks


def find_blocks(model: PreTrainedModel, config: PretrainedConfig) -> tuple[str, nn.ModuleList]:
    """The path and list of the blocks: the heaviest ``ModuleList``, of the configured length if one is.

    Raises:
        Refused: there is none.
    """
    lists: list[tuple[str, nn.ModuleList]] = []
    for path, module in model.named_modules():
        nested = any(path.startswith(outer + ".") for outer, _ in lists)
        if (
            isinstance(module, nn.ModuleList)
            and not nested
            and len(module)
            and any(True for _ in module.parameters())
        ):
            lists.append((path, module))
    depth = getattr(config, "num_hidden_layers", None)
    if not lists:
        raise Refused("it has no list of decoder blocks")
    fitting = [found for found in lists if len(found[1]) == depth] or lists
    return max(fitting, key=lambda found: sum(p.numel() for p in found[1].parameters()))


def takes_positions(model: PreTrainedModel) -> bool:
    """Whether the model's forward, or its base model's, names ``position_ids``."""
    return any(
        "position_ids" in inspect.signature(module.forward).parameters for module in (model, model.base_model)
    )
