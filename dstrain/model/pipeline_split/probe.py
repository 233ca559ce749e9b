"""Tests whether a family can be split into layers that pass on only the hidden state.

The skeleton's forward runs on a tiny batch with stand-ins for all weights. Whatever depends on learned
values is marked through autograd: each stand-in's output and each block's output is a leaf that requires a
gradient.
"""

from __future__ import annotations

import copy
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map
from transformers import PretrainedConfig

from dstrain.errors import DstrainError
from dstrain.model.document_masks import without_kernels
from dstrain.model.pipeline_split.meta_run import run_on_meta
from dstrain.model.pipeline_split.partial_forward import (
    PROBE,
    Call,
    ModuleStub,
    Reached,
    hidden_slot,
    marked,
    to_meta,
)
from dstrain.model.pipeline_split.structure import ModelStructure, Refused
from dstrain.model.router import OtherRouterLossError, router_loss_of

ROWS, LENGTH = 2, 6
PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.Size)


def why_not_pipelined(config: PretrainedConfig, attention: str | None = None) -> str | None:
    """Why a model with this configuration cannot be split into stages, in one sentence; None if it can."""
    try:
        return find_structure(config, attention).refusal
    except DstrainError as error:
        return error.message


def find_structure(config: PretrainedConfig, attention: str | None = None) -> ModelStructure:
    """Build the skeleton, take it apart and probe it; ``refusal`` of the result says why it must stay whole.

    Raises:
        DstrainError: the model cannot be built at all.
    """
    structure = ModelStructure(config, attention)
    try:
        refuse_options(structure.config)
        structure.router = router_loss_of(structure.model, config)
        structure.take_apart()
        with without_kernels(structure.config):
            probe(structure)
        structure.find_tied()
    except Refused as refused:
        structure.refusal = str(refused)
    except OtherRouterLossError:
        structure.refusal = (
            "the router loss of its experts is not the usual one, and is not carried between stages;"
            " set output_router_logits: false in its config.json"
        )
    return structure


def refuse_options(config: PretrainedConfig) -> None:
    """Refuse what the configuration asks for and the layers would silently leave out."""
    if getattr(config, "is_encoder_decoder", False):
        raise Refused("it is an encoder-decoder model")
    for name in ("layerdrop", "decoder_layerdrop"):
        if getattr(config, name, 0):
            raise Refused(f"it drops whole layers at random ({name}); set {name}: 0")


def probe(structure: ModelStructure) -> None:
    """Try the model's forward, and note in ``structure`` which modules belong to the head.

    Raises:
        Refused: with the reason.
    """
    consists_of = structure.modules_of_blocks()
    call = ProbeRun(structure, stop_at=0).run()[0]
    structure.partial_forward.extras = extras = _extras_of_block(structure, call)
    first = ProbeRun(structure, extras=extras)
    calls = first.run()
    if structure.modules_of_blocks() != consists_of:
        raise Refused("its forward exchanges parts of its blocks, depending on the sequence length")
    second = ProbeRun(structure, extras=extras, seed=1)
    for index, (one, other) in enumerate(zip(calls, second.run(), strict=True)):
        _same_arguments(index, one, other)
    assert first.logits is not None and second.logits is not None
    if not torch.equal(first.logits, second.logits):
        raise Refused("its head depends on more than the last block's hidden state")
    structure.in_head = {path for path in structure.module_stubs if path not in first.before}
    _refuse_changed_containers(structure, calls)
    _refuse_used_values(structure, calls)


class ProbeRun:
    """One run of the skeleton's forward with stand-ins for everything.

    Args:
        extras: how many values a block returns beside the hidden state; None: a bare tensor.
        seed: of the token ids and of everything learned but the last block's output, which is always the
            same.
        stop_at: the last block to call; None: run to the logits.
        rows, length: of the batch. Rows of the default length hold two packed documents, longer ones hold
            one.
    """

    def __init__(
        self,
        structure: ModelStructure,
        *,
        extras: int | None = None,
        seed: int = 0,
        stop_at: int | None = None,
        rows: int = ROWS,
        length: int = LENGTH,
    ) -> None:
        self.structure = structure
        self.extras = extras
        self.stop_at = stop_at
        self.rows, self.length = rows, length
        self.seed = seed
        self.random = torch.Generator().manual_seed(seed)
        self.calls: list[Call] = []
        self.before: set[str] = set()
        self.leaves: list[Tensor] = []
        self.last: Tensor | None = None
        self.logits: Tensor | None = None

    def run(self) -> list[Call]:
        partial_forward = self.structure.partial_forward
        vocabulary = getattr(self.structure.config, "vocab_size", 2)
        ids = torch.randint(vocabulary, (self.rows, self.length), generator=self.random)
        if self.seed == 0:
            ids.zero_()
        positions = (torch.arange(self.length) % (3 if self.length == LENGTH else self.length)).repeat(
            self.rows, 1
        )
        for module in partial_forward.loose:
            module.training = False
        partial_forward.probe = self
        try:
            with torch.enable_grad():
                output = partial_forward.run(PROBE, ids, positions)
                self._check_logits(getattr(output, "logits", None))
        except (Reached, Refused) as done:
            if isinstance(done, Refused):
                raise
        except Exception as error:  # whatever a family's code runs into without its weights
            text = " ".join(str(error).split())[:200]
            raise Refused(
                f"its forward does not run without its weights ({type(error).__name__}: {text})"
            ) from error
        finally:
            partial_forward.probe = None
            partial_forward.forget_training()
        if self.stop_at is None and len(self.calls) != partial_forward.count:
            raise Refused(f"its forward calls {len(self.calls)} of its {partial_forward.count} blocks")
        return self.calls

    def at_block(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if index != len(self.calls):
            raise Refused("its blocks are not called once each, in order")
        if not args and not kwargs:
            raise Refused("its blocks are called without a hidden state")
        slot = hidden_slot(args, kwargs)
        hidden = args[slot] if isinstance(slot, int) else kwargs[slot]
        if index == 0:
            self._check_hidden(hidden)
        elif hidden is not self.last:
            raise Refused(f"something happens to the hidden state between blocks {index - 1} and {index}")
        call = marked(args, kwargs, slot)
        self._check_arguments(index, call)
        self.calls.append(call)
        if index == self.stop_at:
            raise Reached
        final = index == self.structure.num_blocks - 1
        self.last = self._leaf(hidden, torch.Generator().manual_seed(7) if final else self.random)
        if self.extras is None:
            return self.last
        return (self.last, *self.structure.beside)

    def at_module_stub(self, stub: ModuleStub, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.calls:
            self.before.add(stub.stub_path)
        elif len(self.calls) < self.structure.num_blocks:
            raise Refused(f"its module {stub.stub_path} is used between blocks")
        elif stub.stub_path in self.before:
            raise Refused(f"its module {stub.stub_path} is used both before and after the blocks")
        # The output follows the input's values, so that what the input depends on shows in the result.
        inputs = [
            x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor) and x.is_floating_point()
        ]
        trace = sum((x.float().mean() for x in inputs), torch.zeros(()))
        output = self.on_meta(stub, args, kwargs)

        def real(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            if not leaf.is_floating_point():
                return torch.zeros(leaf.shape, dtype=leaf.dtype)
            if not self.calls:
                return self._leaf(leaf, self.random) + trace
            return torch.zeros(leaf.shape) + trace

        return tree_map(real, output)

    def on_meta(self, stub: ModuleStub, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the module returns, on meta."""
        with torch.no_grad():
            return stub.stub_twin(*to_meta(args), **to_meta(kwargs))

    def _leaf(self, like: Tensor, random: torch.Generator) -> Tensor:
        leaf = torch.randn(like.shape, generator=random).requires_grad_()
        self.leaves.append(leaf)
        return leaf

    def _check_hidden(self, hidden: Any) -> None:
        if not isinstance(hidden, Tensor) or not hidden.is_floating_point():
            raise Refused("its blocks are not given the hidden state first")
        if hidden.dim() < 3 or hidden.shape[:2] != (self.rows, self.length):
            raise Refused(f"its hidden state is not [batch, sequence, hidden] but {list(hidden.shape)}")
        self.structure.hidden = tuple(hidden.shape[2:])

    def _check_arguments(self, index: int, call: Call) -> None:
        for name, value in _named(call):
            for leaf in tree_flatten(value)[0]:
                if isinstance(leaf, Tensor):
                    if leaf.requires_grad:
                        raise Refused(
                            f"block {index} is given more than the hidden state ({name} is learned)"
                        )
                elif not isinstance(leaf, PLAIN) and not _harmless(leaf):
                    raise Refused(f"block {index} is given a {type(leaf).__name__} as {name}")

    def _check_logits(self, logits: Any) -> None:
        if len(self.calls) != self.structure.num_blocks:
            raise Refused(f"its forward calls {len(self.calls)} of its {self.structure.num_blocks} blocks")
        if (
            not isinstance(logits, Tensor)
            or logits.dim() != 3
            or logits.shape[:2] != (self.rows, self.length)
        ):
            raise Refused("its output has no logits of [batch, sequence, vocabulary]")
        if not logits.requires_grad:
            raise Refused("its logits do not depend on the last block")
        for leaf, gradient in zip(
            self.leaves, torch.autograd.grad(logits.sum(), self.leaves, allow_unused=True), strict=True
        ):
            if (gradient is not None) != (leaf is self.last):
                raise Refused("its logits depend on more than the last block's hidden state")
        self.logits = logits.detach()


def _harmless(leaf: Any) -> bool:
    if isinstance(leaf, MutableMapping):
        return not leaf  # a dict of a class of its own; _refuse_changed_containers looks after it
    return type(leaf).__name__ in ("Hidden", "BlockMask", "OpaqueOutput")


def _named(call: Call) -> list[tuple[str, Any]]:
    return [*((f"argument {i}", value) for i, value in enumerate(call.args)), *call.kwargs.items()]


def _same_arguments(index: int, one: Call, other: Call) -> None:
    for (name, a), (_, b) in zip(_named(one), _named(other), strict=True):
        (a_leaves, a_spec), (b_leaves, b_spec) = tree_flatten(a), tree_flatten(b)
        same = a_spec == b_spec and all(_equal(x, y) for x, y in zip(a_leaves, b_leaves, strict=True))
        if not same:
            raise Refused(f"block {index}'s argument {name} depends on the tokens or on learned values")


def _equal(x: Any, y: Any) -> bool:
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        return x.dtype == y.dtype and x.shape == y.shape and torch.equal(x, y)
    return type(x) is type(y) and (not isinstance(x, PLAIN) or x == y)


def _extras_of_block(structure: ModelStructure, call: Call) -> int | None:
    """How many values block 0 returns beside the hidden state; None: it returns a bare tensor."""
    block = copy.deepcopy(structure.blocks[0][1])
    output = run_on_meta(block, call, structure.hidden, ROWS, LENGTH)
    if isinstance(output, Tensor):
        return None
    if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
        structure.beside = tuple(None if value is None else OpaqueOutput() for value in output[1:])
        return len(output) - 1
    raise Refused(f"its blocks return a {type(output).__name__}, not the hidden state")


def _refuse_used_values(structure: ModelStructure, calls: list[Call]) -> None:
    """Refuse blocks that look at what the block before returned beside the hidden state.

    It may be handed to them: a recurrent state that is None in training, or a choice that only some settings reuse.
    """
    if not structure.beside:
        return
    for index, ((_, block), call) in enumerate(zip(structure.blocks, calls, strict=True)):
        handed = any(isinstance(value, OpaqueOutput) for _, value in _named(call))
        if handed or None in structure.beside:
            output = run_on_meta(copy.deepcopy(block), call, structure.hidden, ROWS, LENGTH)
            for ours, value in zip(structure.beside, output[1:], strict=True):
                if ours is None and value is not None:
                    raise Refused(f"block {index} returns another kind of values than block 0")


class OpaqueOutput:
    """Stands for a value that a block returns beside the hidden state and that stays on its stage.

    It may be handed on, even to the next block, as long as nobody looks at it.
    """

    def _touched(self, *args: Any, **kwargs: Any) -> Any:
        raise Refused("what a block returns beside the hidden state is used after it")

    __getattr__ = __getitem__ = __iter__ = __len__ = __bool__ = _touched
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _touched


def _refuse_changed_containers(structure: ModelStructure, calls: list[Call]) -> None:
    """Refuse blocks that talk to each other through a dict or list that they are all given."""
    shared: Any = [v for call in calls for _, v in _named(call) if isinstance(v, MutableMapping | list)]
    if not shared:
        return
    # A dict of a class of its own is empty here (see _check_arguments), and opaque to torch's walk.
    metas = {
        id(value): to_meta(value) if type(value) in (dict, list) else copy.copy(value) for value in shared
    }
    before = {key: tree_flatten(value) for key, value in metas.items()}
    for (_, block), call in zip(structure.blocks, calls, strict=True):
        args = tuple(metas.get(id(value), value) for value in call.args)
        kwargs = {name: metas.get(id(value), value) for name, value in call.kwargs.items()}
        run_on_meta(copy.deepcopy(block), Call(args, kwargs), structure.hidden, ROWS, LENGTH)
    for key, value in metas.items():
        (leaves, spec), (old, old_spec) = tree_flatten(value), before[key]
        filled = type(value) not in (dict, list) and len(value) > 0
        if filled or spec != old_spec or any(x is not y for x, y in zip(leaves, old, strict=True)):
            raise Refused("its blocks share state that they change (a dict or list among their arguments)")
