"""Runs a family's own forward in parts, so that each pipeline layer runs only its part.

The modules of the skeleton that own weights are replaced by two kinds of stand-in, which the ``PartialForward`` tells
what to do:

- ``BlockStub`` in the place of each decoder block. *Prologue*: stop at block 0, its hidden state is what the
  embeddings hand on. *Arguments*: note how each block is called (rotary tables, masks, alibi). *Epilogue*:
  the last one returns the hidden state that arrived, and the family's own norm, head, scaling and
  soft-capping run.
- ``ModuleStub`` in the place of each other module with weights. It calls the real module, or, where only shapes
  matter, runs a weightless copy on meta and returns zeros of that shape.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import PretrainedConfig, PreTrainedModel

from dstrain.model.document_masks import Documents

PROLOGUE, ARGUMENTS, EPILOGUE, PROBE = "prologue", "arguments", "epilogue", "probe"

BEFORE = -1
"""``PartialForward.reached`` while no block has been called yet."""


class Hidden:
    """Marks where the hidden state stands among a block's arguments."""


HIDDEN = Hidden()


@dataclass(frozen=True)
class Call:
    """The arguments of one block, with ``HIDDEN`` in the place of the hidden state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def apply(self, block: Callable[..., Any], hidden: Tensor) -> Any:
        args = [hidden if value is HIDDEN else value for value in self.args]
        kwargs = {name: hidden if value is HIDDEN else value for name, value in self.kwargs.items()}
        return block(*args, **kwargs)


class Reached(Exception):  # noqa: N818 - not an error: it ends a partial forward
    """The partial forward has what it came for."""

    def __init__(self, value: Any = None) -> None:
        super().__init__()
        self.value = value


class BlockStub(nn.Module):
    """Stands in the model's list of blocks; attributes that the model reads come from the real block."""

    def __init__(self, partial_forward: PartialForward, index: int, real: nn.Module) -> None:
        super().__init__()
        self.__dict__.update(_partial_forward=partial_forward, _index=index, stub_real=real)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["stub_real"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._partial_forward.at_block(self._index, args, kwargs)


class ModuleStub(nn.Module):
    """Stands for a module with weights outside the blocks."""

    def __init__(self, partial_forward: PartialForward, path: str, real: nn.Module) -> None:
        super().__init__()
        self.__dict__.update(
            _partial_forward=partial_forward, stub_path=path, stub_real=real, stub_twin=meta_twin(real)
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["stub_real"], name)

    # The dunders that modules answer to are looked up on the class, past __getattr__.
    def __len__(self) -> int:
        return len(self.stub_real)

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Any:
        return iter(self.stub_real)

    def __getitem__(self, index: Any) -> Any:
        return self.stub_real[index]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._partial_forward.at_module_stub(self, args, kwargs)


def meta_twin(module: nn.Module) -> nn.Module:
    """A copy of ``module`` in eval mode with parameters and buffers on meta."""
    return copy.deepcopy(module).to("meta").eval()


def to_meta(value: Any) -> Any:
    """``value`` with every tensor in it on meta."""
    return tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf, value)


def hidden_slot(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | str:
    """Where a block is given its hidden state: the first positional argument, else ``hidden_states``."""
    if args:
        return 0
    return "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))


class PartialForward:
    """Runs parts of the skeleton's forward. Not thread-safe; one a process is enough.

    Attributes:
        extras: how many values a block returns beside the hidden state (None: it returns a bare tensor).
        loose: modules that belong to no layer (parameterless, or containers of layers).
    """

    def __init__(self, model: PreTrainedModel, config: PretrainedConfig, takes_positions: bool) -> None:
        self.model = model
        self.config = config
        self.takes_positions = takes_positions
        self.documents = Documents(model)
        self.count = 0
        self.extras: int | None = None
        self.loose: list[nn.Module] = []
        self.phase: str | None = None
        self.reached = BEFORE
        self.hidden: Tensor | None = None
        self.calls: list[Call] = []
        self.probe: Any = None
        self._device: torch.device | None = None
        self._training = False
        self._epilogue_training = False

    # What the stand-ins ask

    def at_block(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.phase == PROBE:
            return self.probe.at_block(index, args, kwargs)
        slot = hidden_slot(args, kwargs)
        hidden = args[slot] if isinstance(slot, int) else kwargs[slot]
        last = index == self.count - 1
        self.reached = index
        if self.phase == PROLOGUE:
            raise Reached(hidden)
        if self.phase == ARGUMENTS:
            self.calls.append(marked(args, kwargs, slot))
            if last:
                raise Reached
            return self.packed(hidden)
        if self.phase == EPILOGUE:
            if last:
                self._set_training(self._epilogue_training)
                return self.packed(self.hidden)
            return self.packed(hidden)
        raise RuntimeError("the skeleton's forward was called outside of a layer")

    def at_module_stub(self, stub: ModuleStub, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.phase == PROBE:
            return self.probe.at_module_stub(stub, args, kwargs)
        if self.phase in (ARGUMENTS, EPILOGUE) and self.reached == BEFORE:
            return self._zeros_like_output(stub, args, kwargs)
        return stub.stub_real(*args, **kwargs)

    def packed(self, hidden: Any) -> Any:
        """``hidden`` in the shape that the family's blocks return it."""
        return hidden if self.extras is None else (hidden, *([None] * self.extras))

    # What the layers ask

    def prologue(self, input_ids: Tensor, position_ids: Tensor, *, training: bool) -> Tensor:
        """Hidden state [B, S, H] that the first block is called with."""
        self._set_training(training)
        try:
            self.run(PROLOGUE, input_ids, position_ids)
        except Reached as done:
            reached: Tensor = done.value
            return reached
        raise RuntimeError("the model's forward did not call its first block")

    @torch.no_grad()
    def arguments(self, hidden: Tensor, position_ids: Tensor) -> list[Call]:
        """How the family calls each block for these positions; uses no weights and no random numbers."""
        self._set_training(False)
        self.hidden, self.calls = hidden, []
        try:
            self.run(ARGUMENTS, torch.zeros_like(position_ids), position_ids)
        except Reached:
            return self.calls
        finally:
            self.hidden, self.calls = None, []
        raise RuntimeError("the model's forward did not call its last block")

    def epilogue(self, hidden: Tensor, position_ids: Tensor, *, training: bool) -> Tensor:
        """Logits [B, S, V] from the last block's hidden state [B, S, H]."""
        # Until the last block is reached only shapes matter: no dropout, no random numbers drawn.
        self._set_training(False)
        self._epilogue_training = training
        self.hidden = hidden
        try:
            logits: Tensor = self.run(EPILOGUE, torch.zeros_like(position_ids), position_ids).logits
            return logits
        finally:
            self.hidden = None

    def run(self, phase: str, input_ids: Tensor, position_ids: Tensor) -> Any:
        """Call the family's forward in one phase; a ``Reached`` passes through."""
        self._follow(position_ids.device)
        self.phase, self.reached = phase, BEFORE
        inputs: dict[str, Any] = {"input_ids": input_ids, "use_cache": False}
        if self.takes_positions:
            inputs["position_ids"] = position_ids
        try:
            if phase not in (ARGUMENTS, PROBE):
                with self.documents.unseen():
                    return self.model(**inputs)
            with self.documents.apart(position_ids) as lengths:
                return self.model(**inputs, **lengths)
        finally:
            self.phase = None

    def to(self, device: torch.device | str) -> None:
        """Move the buffers that belong to no layer; their dtype stays."""
        for module in self.loose:
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(device)
        self._device = torch.device(device)

    def _follow(self, device: torch.device) -> None:
        if device != self._device:
            self.to(device)

    def _set_training(self, training: bool) -> None:
        if training != self._training:
            for module in self.loose:
                module.training = training
            self._training = training

    def forget_training(self) -> None:
        """After a probe, which sets the modes of modules by itself: all are in eval mode."""
        self._training = False

    def _zeros_like_output(self, stub: ModuleStub, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with torch.no_grad():
            output = stub.stub_twin(*to_meta(args), **to_meta(kwargs))
        hidden = self.hidden
        assert hidden is not None

        def real(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            dtype = hidden.dtype if leaf.is_floating_point() else leaf.dtype
            return torch.zeros(leaf.shape, dtype=dtype, device=hidden.device)

        return tree_map(real, output)


def marked(args: tuple[Any, ...], kwargs: dict[str, Any], slot: int | str) -> Call:
    """The call with its hidden state taken out (so that a cache of calls does not keep it alive)."""
    if isinstance(slot, int):
        return Call((*args[:slot], HIDDEN, *args[slot + 1 :]), dict(kwargs))
    return Call(tuple(args), {**kwargs, slot: HIDDEN})
