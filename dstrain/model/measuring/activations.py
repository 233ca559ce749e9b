"""Measures what each layer's forward pass saves for the backward pass, and temporary memory, on the meta device."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from dstrain.lora import base_name, is_adapter_parameter
from dstrain.model.measuring.flops import LENGTH, expert_parameters_met, loops_over_experts, per_token
from dstrain.model.pipeline_split.meta_run import NoData, to_meta_kwargs
from dstrain.model.pipeline_split.partial_forward import Call, ModuleStub, to_meta
from dstrain.model.pipeline_split.probe import ProbeRun
from dstrain.model.pipeline_split.structure import ModelStructure, Refused
from dstrain.model.quantization import compute_in, keeps_inputs, unpacked_shapes

DTYPES = (torch.bfloat16, torch.float32)
"""The bytes are found in 16 bits and in fp32: what a family raises to fp32 itself is not halved."""

BY_FORMULA = 34
"""Bytes a token and hidden element in 16 bits, where a block does not run on meta: attention's square left out.

Source: Korthikanti et al. 2022, Reducing Activation Recomputation in Large Transformer Models, equation 1.
"""


@dataclass(frozen=True)
class Activations:
    """Bytes of one layer, in 16 bits and in fp32, for a token, and for a token and each position of the sequence.

    Attributes:
        saved: what its backward pass needs of its forward pass, its input with it.
        working: what its forward or its backward pass takes beside that, at its fullest moment.
        given: what it is given by the layer before it, and needs to run again.
    """

    saved: tuple[int, int] = (0, 0)
    saved_of_position: tuple[float, float] = (0.0, 0.0)
    working: tuple[int, int] = (0, 0)
    working_of_position: tuple[float, float] = (0.0, 0.0)
    given: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class MeasuredLayer:
    """What a plan needs to know of a layer beside its parameters: see `dstrain.planning.model_shape.Layer`."""

    flops: int
    flops_of_position: float
    activations: Activations


@dataclass(frozen=True)
class _Bytes:
    """Of one sequence."""

    saved: int = 0
    working: int = 0


def block_activations(structure: ModelStructure, index: int) -> Activations:
    """Bytes of a block. With sdpa and flash attention its parts for each position are 0: they keep no square."""
    config = structure.config
    length = length_apart(structure.blocks[index][1])
    found = []
    for dtype in DTYPES:
        given = math.prod(structure.hidden) * dtype.itemsize
        try:
            short, long = (_of_block(structure, index, tokens, dtype) for tokens in (length, 2 * length))
        except Refused:
            width = config.hidden_size * dtype.itemsize
            found.append((BY_FORMULA * width / 2, 0.0, 2 * width, 0.0, given))
            continue
        part, part_of_position = per_token(short.saved, long.saved, length)
        if loops_over_experts(structure):
            part += saved_of_experts(structure.blocks[index][1], config) * dtype.itemsize
        found.append((part, part_of_position, *per_token(short.working, long.working, length), given))
    return both_types(found)


def blocks_that_run(structure: ModelStructure) -> dict[int, str | None]:
    """By the number of the first block of each kind: None where it runs on meta, else why not."""
    found: dict[int, str | None] = {}
    kinds = set()
    for index, (_, block) in enumerate(structure.blocks if structure.refusal is None else ()):
        kind = tuple(
            (base_name(name), tuple(parameter.shape))
            for name, parameter in block.named_parameters()
            if not is_adapter_parameter(name)
        )
        if kind not in kinds:
            kinds.add(kind)
            try:
                _of_block(structure, index, length_apart(block), torch.float32)
                found[index] = None
            except Refused as refused:
                found[index] = str(refused.__cause__ or refused)
    return found


def saved_of_experts(block: nn.Module, config: Any) -> float:
    """Elements that the experts of a token save, where they are run one by one: on meta none is chosen.

    A matrix keeps its input: parameters / hidden size elements, as two of an expert's three matrices are as wide as
    that, and its activation functions one half again.
    """
    return 1.5 * expert_parameters_met(block, config) / float(config.hidden_size)


def outer_activations(structure: ModelStructure) -> tuple[Activations, Activations]:
    """Bytes of what runs before the blocks, and behind them: of its modules, without what lies between these.

    Logits are not counted: what they take depends on the loss.
    """
    before, after = [], []
    for dtype in DTYPES:
        trials = [_Outer(structure, length, dtype) for length in (LENGTH, 2 * LENGTH)]
        try:
            for trial in trials:
                trial.run()
        except Refused:
            width = structure.config.hidden_size * dtype.itemsize
            before.append((0.0,) * 5)
            after.append((2.0 * width, 0.0, 2.0 * width, 0.0, width))
            continue
        for place, found in (("before", before), ("after", after)):
            sums = [trial.found[place] for trial in trials]
            found.append(
                (*per_token(*(one.saved for one in sums)), *per_token(*(one.working for one in sums)), 0)
            )
    return both_types(before), both_types(after)


def length_apart(module: nn.Module) -> int:
    """A length to measure at, as `LENGTH` and a multiple of it: no weight is as wide as it, or as twice it, since
    gradients of weights are told from other tensors by their shapes."""
    widths = {width for shape in unpacked_shapes(module) for width in shape}
    return next(n for n in range(LENGTH, 64 * LENGTH, 2 * LENGTH) if not widths & {n, 2 * n})


def both_types(found: Sequence[tuple[float, ...]]) -> Activations:
    """From the numbers of `Activations`, once in 16 bits and once in fp32."""
    saved, saved_of_position, working, working_of_position, given = zip(*found, strict=True)
    return Activations(
        tuple(map(round, saved)),
        saved_of_position,
        tuple(map(round, working)),
        working_of_position,
        tuple(map(round, given)),
    )


class _FusedKernel(torch.autograd.Function):
    """What a fused kernel keeps: its inputs, its output and a number a row. On meta torch would keep the square of
    scores.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, length, _ = query.shape
        # As the kernels lay it out, so that the families bring the heads together without a copy.
        output = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(
            query, key, value, output, query.new_empty(batch, heads, length, dtype=torch.float32)
        )
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


_fused_attention: Callable[..., Tensor] = _FusedKernel.apply


class GpuKernels(TorchFunctionMode):
    """Operations that keep less on a GPU than on meta keep what they keep there.

    Attention keeps what a fused kernel does, and dropout the places in one byte each.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            names = ("query", "key", "value")
            return _fused_attention(*args[:3], *(kwargs[name] for name in names[len(args[:3]) :]))
        if func is torch.nn.functional.dropout:
            return _dropout(*args, **kwargs)
        return func(*args, **kwargs)


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(input, p, training)[0] if training and p > 0 else input


class AliveStorages(TorchDispatchMode):
    """Bytes of the storages that operations made and that are alive, and the most that there were at a time.

    Args:
        shapes: of parameters: storages of these shapes, or turned, are gradients of theirs, and not counted. A
            linear layer with a bias makes its weight's turned.
    """

    def __init__(self, shapes: set[torch.Size]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._shapes = shapes | {shape[::-1] for shape in shapes if len(shape) == 2}
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def leave_out(self, tensors: Any) -> None:
        for tensor in tensors:
            self._known[storage_of(tensor)] = weakref.ref(tensor.untyped_storage())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.is_meta and leaf.shape not in self._shapes:
                self._see(leaf.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known and self._known[key]() is storage:
            return

        def end(_: Any) -> None:
            self.now -= size

        self._known[key] = weakref.ref(storage, end)
        self.now += size
        self.most = max(self.most, self.now)


def _of_block(structure: ModelStructure, index: int, length: int, dtype: torch.dtype) -> _Bytes:
    """Of a block and one sequence, beside weights and what all blocks share. Raises Refused: it does not run so."""
    call = ProbeRun(
        structure, extras=structure.partial_forward.extras, rows=1, length=length, stop_at=index
    ).run()[index]
    args, kwargs = _cast(to_meta(call.args), dtype), _cast(to_meta_kwargs(call.kwargs), dtype)
    block = copy.deepcopy(structure.blocks[index][1]).to("meta", dtype).train()
    compute_in(block, dtype)
    hidden = torch.empty(1, length, *structure.hidden, device="meta", dtype=dtype, requires_grad=True)
    return _of_module(block, lambda given: Call(args, kwargs).apply(block, given), hidden, (args, kwargs))


def _of_module(module: nn.Module, run: Callable[[Tensor], Any], hidden: Tensor, shared: Any) -> _Bytes:
    """Of a module that is run with ``hidden``. ``shared``: what else it is given, which is not counted."""
    others = [x for x in tree_flatten(shared)[0] if isinstance(x, Tensor)]
    not_counted = {storage_of(tensor) for tensor in (*module.parameters(), *module.buffers(), *others)}
    packed: list[weakref.ref[_Packed]] = []

    def note(tensor: Tensor) -> _Packed:
        held = _Packed(tensor)
        packed.append(weakref.ref(held))
        return held

    alive = AliveStorages(unpacked_shapes(module))
    alive.leave_out((*module.parameters(), *module.buffers(), *others, hidden))
    own = hidden.untyped_storage().nbytes()
    try:
        with torch.enable_grad(), NoData(), GpuKernels(), alive:
            with saved_tensors_hooks(note, lambda held: held.tensor):
                output = run(hidden)
            # What belongs to a part of the graph that is gone, since nobody uses its result, is not kept.
            kept = {storage_of(held.tensor): held.tensor for held in (ref() for ref in packed) if held}
            saved = sum(x.untyped_storage().nbytes() for key, x in kept.items() if key not in not_counted)
            keeps_input = storage_of(hidden) in kept
            forward = alive.most + own  # the input is there, kept or not
            output = output if isinstance(output, Tensor) else output[0]
            stays = storage_of(output) in kept
            if keeps_inputs(module):
                saved = max(saved, alive.now + own - output.untyped_storage().nbytes() * (not stays))
                keeps_input = True
            kept.clear()
            # What comes from the next layer is alive at first; the output is not, unless this layer keeps it.
            alive.most = alive.now
            output.backward(torch.empty_like(output))
            backward = alive.most + own * keeps_input - output.untyped_storage().nbytes() * (not stays)
    except Exception as error:  # whatever a family's code runs into without values
        raise Refused(f"its block does not run without its weights ({type(error).__name__})") from error
    return _Bytes(saved, max(0, forward - saved, backward - saved))


class _Packed:
    """What autograd keeps in place of a tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class _Outer(ProbeRun):
    """A run that measures the modules before and behind the blocks, each by itself."""

    def __init__(self, structure: ModelStructure, length: int, dtype: torch.dtype) -> None:
        super().__init__(structure, extras=structure.partial_forward.extras, rows=1, length=length)
        self.dtype = dtype
        self.found = {"before": _Bytes(), "after": _Bytes()}

    def on_meta(self, stub: ModuleStub, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        place = "after" if self.calls else "before"
        output = super().on_meta(stub, args, kwargs)
        first = args[0] if args else None
        if isinstance(first, Tensor) and first.is_floating_point() and isinstance(output, Tensor):
            one = self._measured(stub, first, args[1:], kwargs, output)
            sums = self.found[place]
            self.found[place] = _Bytes(sums.saved + one.saved, max(sums.working, one.working))
        return output

    def _measured(self, stub: ModuleStub, first: Tensor, args: Any, kwargs: Any, output: Tensor) -> _Bytes:
        module = copy.deepcopy(stub.stub_twin).to(self.dtype).train()
        compute_in(module, self.dtype)
        hidden = torch.empty(first.shape, device="meta", dtype=self.dtype, requires_grad=True)
        others = _cast((to_meta(args), to_meta(kwargs)), self.dtype)
        if output.shape[-1] == getattr(self.structure.config, "vocab_size", None):
            return _Bytes(hidden.untyped_storage().nbytes())  # the matrix multiplication keeps its input
        return _of_module(module, lambda given: module(given, *others[0], **others[1]), hidden, others)


def _cast(values: Any, dtype: torch.dtype) -> Any:
    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return tree_map(cast, values)


def storage_of(tensor: Tensor) -> int:
    """Which storage a tensor looks at: on meta there are no addresses to compare."""
    return int(tensor.untyped_storage()._cdata)
