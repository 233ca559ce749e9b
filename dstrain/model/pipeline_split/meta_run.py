"""Runs a block on the meta device: the shape of its output, and its FLOPs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers.integrations.moe  # noqa: F401 - registers grouped_mm_fallback
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

from dstrain.model.pipeline_split.partial_forward import Call, to_meta
from dstrain.model.pipeline_split.structure import Refused

GROUPED = tuple(
    getattr(place, name)
    for place, name in ((torch.nn.functional, "grouped_mm"), (torch, "_grouped_mm"))
    if hasattr(place, name)
) + (
    (torch.ops.transformers.grouped_mm_fallback,)
    if hasattr(torch.ops.transformers, "grouped_mm_fallback")
    else ()
)


class _OneExpert(torch.autograd.Function):
    """Each row meets one expert: the shape and the FLOPs of a grouped multiplication, and what that keeps. A gradient
    of one expert's part of the weights is never there."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights)
        return rows @ weights[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        _, weights = ctx.saved_tensors
        return gradient @ weights[0].mT, None


_one_expert: Callable[[Tensor, Tensor], Tensor] = _OneExpert.apply


class NoData(TorchFunctionMode):
    """Answers the questions about values that mixtures of experts ask: no token chose any expert."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, Tensor) and first.is_meta:
            if func in (torch.nonzero, Tensor.nonzero):
                found = torch.empty(0, first.dim(), dtype=torch.long, device="meta")
                return tuple(found.unbind(1)) if kwargs.get("as_tuple") else found
            if func is torch.where and len(args) == 1 and not kwargs:
                return tuple(torch.empty(0, first.dim(), dtype=torch.long, device="meta").unbind(1))
            if func in (Tensor.tolist, Tensor.item):
                zeros = torch.zeros(first.shape, dtype=first.dtype)
                return zeros.tolist() if func is Tensor.tolist else zeros.item()
            if func in (Tensor.cpu, Tensor.numpy):
                zeros = torch.zeros(first.shape, dtype=first.dtype)
                return zeros if func is Tensor.cpu else zeros.numpy()
            if func in (Tensor.__bool__, Tensor.__contains__):
                return False
            if func in (Tensor.split, torch.split) and len(args) > 1 and isinstance(args[1], list | tuple):
                # Sizes that came from values: they are zeros, so one takes all.
                sizes, dim = list(args[1]), args[2] if len(args) > 2 else kwargs.get("dim", 0)
                return func(first, [first.shape[dim] - sum(sizes[1:]), *sizes[1:]], dim)
            if func in (Tensor.__getitem__, Tensor.__setitem__) and _is_mask(args[1]):
                chosen = first.new_empty(0, *first.shape[args[1].dim() :])
                return None if func is Tensor.__setitem__ else chosen
            if func in GROUPED:
                # Its meta kernel takes bf16 only.
                return _one_expert(first, args[1])
        return func(*args, **kwargs)


def run_on_meta(block: nn.Module, call: Call, hidden: tuple[int, ...], rows: int, length: int) -> Any:
    """Call ``block`` on meta with a hidden state [rows, length, *hidden]; its buffers move to meta for
    good.

    Raises:
        Refused: the block does not run so.
    """
    block = block.to("meta").eval()
    state = torch.empty(rows, length, *hidden, device="meta")
    meta = Call(to_meta(call.args), to_meta_kwargs(call.kwargs))
    try:
        with torch.no_grad(), NoData():
            return meta.apply(block, state)
    except Refused:
        raise
    except Exception as error:  # whatever a family's code runs into without values
        text = " ".join(str(error).split())[:200]
        raise Refused(
            f"its block does not run without its weights ({type(error).__name__}: {text})"
        ) from error


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype == torch.bool


def to_meta_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments on meta; containers that are on meta already stay the same objects."""
    return {name: value if _on_meta(value) else to_meta(value) for name, value in kwargs.items()}


def _on_meta(value: Any) -> bool:
    if not isinstance(value, dict | list):
        return False
    return all(not isinstance(leaf, Tensor) or leaf.is_meta for leaf in tree_flatten(value)[0])
