"""Measures the layers of a model that can't be split, as they run together on the meta device."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig, PreTrainedModel

from dstrain.model.adapters import Adapters
from dstrain.model.initialise import cast
from dstrain.model.measuring.activations import (
    DTYPES,
    AliveStorages,
    GpuKernels,
    MeasuredLayer,
    both_types,
    length_apart,
    storage_of,
)
from dstrain.model.measuring.flops import flop_counter, per_token
from dstrain.model.pipeline_split.meta_run import NoData
from dstrain.model.pipeline_split.structure import Refused, find_blocks
from dstrain.model.quantization import compute_in, unpacked_shapes
from dstrain.model.skeleton import empty_model


def measure_whole_model(config: PretrainedConfig, adapters: Adapters | None = None) -> list[MeasuredLayer]:
    """Of [what runs before the blocks, each block, what runs behind them].

    Args:
        adapters: to be measured with it.

    Raises:
        Refused: the model has no list of blocks, or does not run without its weights.
    """
    length = length_apart(_empty_model(config, adapters))
    found = []
    for dtype in DTYPES:
        runs = [
            _Run(config, adapters, tokens, dtype).measured(with_flops=dtype is DTYPES[0])
            for tokens in (length, 2 * length)
        ]
        found.append(list(zip(*runs, strict=True)))
    layers = []
    for of_types in zip(*found, strict=True):
        numbers = [
            (
                *per_token(short.saved, long.saved, length),
                *per_token(short.working, long.working, length),
                long.given / (2 * length),
            )
            for short, long in of_types
        ]
        short, long = of_types[0]
        flops, flops_of_position = per_token(short.flops, long.flops, length)
        layers.append(MeasuredLayer(round(flops), flops_of_position, both_types(numbers)))
    return layers


def _empty_model(config: PretrainedConfig, adapters: Adapters | None) -> PreTrainedModel:
    model = empty_model(config)
    if adapters is not None:
        adapters.add_to_model(model, without_data=True)
    return model


@dataclass
class _Layer:
    """Of one sequence: bytes as in `Activations`, and FLOPs of the forward pass."""

    saved: int = 0
    working: int = 0
    given: int = 0
    flops: int = 0


@dataclass
class _Run:
    """A forward and a backward pass of the model on meta."""

    config: PretrainedConfig
    adapters: Adapters | None
    length: int
    dtype: torch.dtype
    kept: dict[int, Tensor] = field(default_factory=dict)
    given: dict[int, weakref.ref[torch.UntypedStorage]] = field(default_factory=dict)

    def measured(self, *, with_flops: bool) -> list[_Layer]:
        """``with_flops``: they are the same in each type."""
        model, blocks = self._model()
        # Without positions, which would be taken for those of several documents: these need a mask.
        ids = torch.zeros(1, self.length, dtype=torch.int64, device="meta")
        self.layers = [_Layer() for _ in range(len(blocks) + 2)]
        self.place = self.beside = 0
        own = {storage_of(tensor) for tensor in (*model.parameters(), *model.buffers(), ids)}
        self.alive = AliveStorages(unpacked_shapes(model))
        self.alive.leave_out((*model.parameters(), *model.buffers(), ids))
        try:
            if with_flops:
                self._count_flops(model, blocks, ids)
            with torch.enable_grad(), NoData(), GpuKernels(), self.alive:
                with self._at_blocks(blocks), saved_tensors_hooks(self._keep(own), lambda tensor: tensor):
                    logits = model(input_ids=ids, use_cache=False).logits
                self._leave_out_logits(logits)
                self._passed(self.place)
                loss = _loss(logits)
                del logits
                self._backward(loss)
        except Exception as error:  # whatever a family's code runs into without values
            text = " ".join(str(error).split())[:200]
            raise Refused(f"it does not run without its weights ({type(error).__name__}: {text})") from error
        return self.layers

    def _model(self) -> tuple[PreTrainedModel, list[nn.Module]]:
        """The model on meta, in training, and its blocks. Raises Refused."""
        model = _empty_model(self.config, self.adapters)
        _, blocks = find_blocks(model, model.config)
        nn.Module.to(model, "meta")
        cast(model, self.dtype)
        compute_in(model, self.dtype)
        return model.train(), list(blocks)

    def _count_flops(self, model: PreTrainedModel, blocks: Sequence[nn.Module], ids: Tensor) -> None:
        """Of each layer, in a forward pass of its own: the stand-in of `GpuKernels` for attention has none."""
        counter = flop_counter()

        def pass_to(index: int) -> Any:
            def note(*_: Any) -> None:
                self.layers[self.place].flops += counter.get_total_flops() - sum(x.flops for x in self.layers)
                self.place = index

            return note

        hooks = []
        for index, block in enumerate(blocks, start=1):
            hooks.append(block.register_forward_pre_hook(pass_to(index)))
            hooks.append(block.register_forward_hook(pass_to(index + 1 if index == len(blocks) else index)))
        with torch.no_grad(), NoData(), counter:
            model(input_ids=ids, use_cache=False)
            pass_to(0)()
        for hook in hooks:
            hook.remove()

    def _keep(self, own: set[int]) -> Any:
        def keep(tensor: Tensor) -> Tensor:
            key = storage_of(tensor)
            if key not in own and key not in self.kept:
                self.kept[key] = tensor
                self.layers[self.place].saved += tensor.untyped_storage().nbytes()
            return tensor

        return keep

    @contextmanager
    def _at_blocks(self, blocks: Sequence[nn.Module]) -> Iterator[None]:
        """Note in which block the pass is, and when the gradient of what it returns is there."""
        self.begun: list[Tensor] = []
        hooks = []
        for index, block in enumerate(blocks, start=1):
            hooks.append(block.register_forward_pre_hook(self._enter(index), with_kwargs=True))
            hooks.append(block.register_forward_hook(self._leave(index)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _enter(self, index: int) -> Any:
        def enter(block: nn.Module, args: Any, kwargs: Any) -> None:
            self._passed(index - 1)
            self.place = index
            given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.requires_grad]
            new = {storage_of(x): x.untyped_storage() for x in given}
            for key, storage in new.items():
                known = self.given.get(key)
                if known is None or known() is not storage:  # what several blocks are given is there once
                    self.layers[index].given += storage.nbytes()
                    self.given[key] = weakref.ref(storage)

        return enter

    def _leave(self, index: int) -> Any:
        def leave(block: nn.Module, args: Any, output: Any) -> None:
            self._passed(index)
            if index == len(self.layers) - 2:
                self.place = index + 1
            first = output if isinstance(output, Tensor) else output[0]
            if first.requires_grad:  # some families run their blocks several times, and train the last one
                first.register_hook(lambda gradient: self._returned(index))

        return leave

    def _passed(self, index: int) -> None:
        """The forward pass leaves a layer. A block's backward pass takes more than its forward pass."""
        if index in (0, len(self.layers) - 1):
            there = sum(each.saved for each in self.layers)
            self.layers[index].working = max(0, self.alive.most - there - self.beside)
        self.alive.most = self.alive.now

    def _leave_out_logits(self, logits: Tensor) -> None:
        """They are the loss's, whose memory depends on its kind."""
        self.beside = logits.untyped_storage().nbytes()
        if self.kept.pop(storage_of(logits), None) is not None:
            self.layers[-1].saved -= self.beside

    def _backward(self, loss: Tensor) -> None:
        self.kept.clear()
        self.turn = len(self.layers) - 1
        self.alive.most = self.alive.now
        self.beside *= 2  # the logits and their gradient
        loss.backward()
        self._returned(0)

    def _returned(self, index: int) -> None:
        """The backward pass has come to a layer's output: it is through with the one behind it."""
        layer = self.layers[self.turn]
        there = sum(each.saved for each in self.layers[: self.turn + 1])
        layer.working = max(layer.working, self.alive.most - there - self.beside)
        self.alive.most = self.alive.now
        self.beside = 0
        self.turn = index


class _Loss(torch.autograd.Function):
    """Keeps the logits, and makes a gradient of them."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        return logits.new_empty(())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return torch.empty_like(ctx.saved_tensors[0])


_loss: Callable[[Tensor], Tensor] = _Loss.apply
