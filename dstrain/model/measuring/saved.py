"""What a block keeps of its forward pass for the backward pass, in bytes, found on meta: no weights, no memory."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from dstrain.model.dissection.anatomy import Anatomy, Refused
from dstrain.model.dissection.driver import Call, to_meta
from dstrain.model.dissection.meta_run import NoData, to_meta_kwargs
from dstrain.model.dissection.probe import Trial
from dstrain.model.measuring.flops import LENGTH, expert_parameters_met, loops_over_experts, per_token

DTYPES = (torch.bfloat16, torch.float32)
"""The bytes are found in 16 bits and in fp32: what a family raises to fp32 itself is not halved."""

BY_FORMULA = 34
"""Bytes a token and hidden element in 16 bits, where a block does not run on meta: attention's square left out.

Source: Korthikanti et al. 2022, Reducing Activation Recomputation in Large Transformer Models, equation 1.
"""


def saved_bytes(anatomy: Anatomy, index: int) -> tuple[tuple[int, int], tuple[float, float]]:
    """Bytes that a block's backward pass needs, for a token: in 16 bits and in fp32.

    Returns:
        The fixed parts, and the parts for each position of the sequence: 0 with sdpa and flash attention, which
        keep no square of scores.
    """
    config = anatomy.config
    fixed, share = [], []
    for dtype in DTYPES:
        try:
            both = [_saved(anatomy, index, length, dtype) for length in (LENGTH, 2 * LENGTH)]
        except Refused:
            fixed.append(BY_FORMULA * config.hidden_size * dtype.itemsize // 2)
            share.append(0.0)
            continue
        part, part_of_position = per_token(*both)
        if loops_over_experts(anatomy):
            # None is chosen on meta. A matrix keeps its input: parameters / hidden size elements, as two of an
            # expert's three matrices are as wide as that, and its activation functions one half again.
            met = expert_parameters_met(anatomy.blocks[index][1], config)
            part += 1.5 * dtype.itemsize * met / config.hidden_size
        fixed.append(round(part))
        share.append(part_of_position)
    return (fixed[0], fixed[1]), (share[0], share[1])


class _FusedAttention(torch.autograd.Function):
    """What a fused kernel keeps: its inputs and its output. On meta torch would keep the square of scores."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output)
        return output


class _Fused(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            names = ("query", "key", "value")
            return _FusedAttention.apply(*args[:3], *(kwargs[name] for name in names[len(args[:3]) :]))
        return func(*args, **kwargs)


def _saved(anatomy: Anatomy, index: int, length: int, dtype: torch.dtype) -> int:
    """Bytes that autograd keeps of a block's forward for one sequence, beside weights and what all blocks share.

    Raises:
        Refused: the block does not run so.
    """
    call = Trial(anatomy, extras=anatomy.driver.extras, rows=1, length=length, stop_at=index).run()[index]

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    args, kwargs = tree_map(cast, to_meta(call.args)), tree_map(cast, to_meta_kwargs(call.kwargs))
    block = copy.deepcopy(anatomy.blocks[index][1]).to("meta", dtype).train()
    shared = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    not_counted = {_storage(tensor) for tensor in (*block.parameters(), *block.buffers(), *shared)}
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        kept.setdefault(_storage(tensor), tensor)
        return tensor

    hidden = torch.empty(1, length, *anatomy.hidden, device="meta", dtype=dtype, requires_grad=True)
    try:
        with torch.enable_grad(), saved_tensors_hooks(note, lambda tensor: tensor), NoData(), _Fused():
            Call(args, kwargs).apply(block, hidden)
    except Exception as error:  # whatever a family's code runs into without values
        raise Refused(f"its block does not run without its weights ({type(error).__name__})") from error
    return sum(x.untyped_storage().nbytes() for key, x in kept.items() if key not in not_counted)


def _storage(tensor: Tensor) -> int:
    """Which storage a tensor looks at: on meta there are no addresses to compare."""
    return tensor.untyped_storage()._cdata
