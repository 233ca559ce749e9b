"""Which kernel torch's scaled dot product attention takes on a GPU, by torch's rules, and its memory.

The order is flash, memory-efficient, math. flash takes no mask and no fp32, needs compute capability 8.0, and head
sizes up to 256; memory-efficient takes a mask, and as many heads of keys as of queries; math takes all, and stores
the probabilities.

Packed rows may call flash attention by themselves (`dstrain.model.varlen_attention`): those calls are counted too.

Source: ATen/native/transformers/cuda/sdp_utils.cpp of torch 2.11 to 2.13. (cuDNN's kernel comes last there.)
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dstrain.rehearsal.fake_tensors import dtype_name
from dstrain.rehearsal.replacing import replace


@dataclass(frozen=True)
class AttentionCall:
    """One kind of call.

    Attributes:
        kernel: ``flash``, ``memory-efficient`` or ``math``; ``flash (varlen)`` for documents laid end to end.
        reason: why none of those before it; empty for the first.
        query, key: their shapes, [B, heads, S, head size]; of documents laid end to end [B * S, heads, head size].
        dtype: of the query.
        mask: its type and shape in words; empty without one.
    """

    kernel: str
    reason: str
    query: tuple[int, ...]
    key: tuple[int, ...]
    dtype: str
    mask: str


class AttentionKernels:
    """Takes the place of ``F.scaled_dot_product_attention``, and counts the calls on GPUs."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self.calls: Counter[AttentionCall] = Counter()
        self._capability = capability
        self._original = replace(functional, "scaled_dot_product_attention", self._attention)

    def see(self, operation: Any, arguments: Any) -> None:
        """Count what calls a kernel by itself: torch's flash attention for packed rows."""
        if operation.namespace == "torch_attn" and operation.overloadpacket.__name__ == "_varlen_attn":
            query, key = arguments[:2]
            self.calls[
                AttentionCall(
                    "flash (varlen)", "", tuple(query.shape), tuple(key.shape), dtype_name(query.dtype), ""
                )
            ] += 1

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if query.device.type != "cuda":
            found: Tensor = self._original(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
            return found
        kernel, reason = choose_kernel(query, key, value, attn_mask, enable_gqa, self._capability)
        mask = f"{dtype_name(attn_mask.dtype)} {list(attn_mask.shape)}" if attn_mask is not None else ""
        self.calls[
            AttentionCall(kernel, reason, tuple(query.shape), tuple(key.shape), dtype_name(query.dtype), mask)
        ] += 1
        operations: Any = torch.ops.aten
        if kernel == "flash":
            result: Tensor = operations._scaled_dot_product_flash_attention(
                query, key, value, dropout_p, is_causal, False, scale=scale
            )[0]
            return result
        bias = _bias(query, key, attn_mask)
        if kernel == "memory-efficient":
            result = operations._scaled_dot_product_efficient_attention(
                query, key, value, bias, query.requires_grad, dropout_p, is_causal, scale=scale
            )[0]
            return result
        result = operations._scaled_dot_product_attention_math(
            query, key, value, bias, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )[0]
        return result


def choose_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    enable_gqa: bool,
    capability: tuple[int, int],
) -> tuple[str, str]:
    """The kernel and why none of those before it was taken."""
    head = query.shape[-1]
    not_flash = _first(
        (mask is not None, "it has a mask"),
        (query.dtype not in (torch.float16, torch.bfloat16), f"it is in {dtype_name(query.dtype)}"),
        (head != value.shape[-1], "keys and values have different head sizes"),
        (head > 256, f"its head size is {head}"),
        (capability < (8, 0), f"compute capability {capability[0]}.{capability[1]} is below 8.0"),
    )
    if not not_flash:
        return "flash", ""
    grouped = enable_gqa and key.shape[1] != query.shape[1]
    elements = 16 // query.element_size() if capability >= (7, 5) or query.dtype == torch.float16 else 1
    not_efficient = _first(
        (grouped, "it has fewer heads of keys than of queries"),
        (query.dtype == torch.bfloat16 and capability < (8, 0), "bfloat16 needs compute capability 8.0"),
        (bool(head % elements), f"its head size {head} is no multiple of {elements}"),
    )
    if not not_efficient:
        return "memory-efficient", f"not flash: {not_flash}"
    return "math", f"not flash: {not_flash}; not memory-efficient: {not_efficient}"


def _first(*reasons: tuple[bool, str]) -> str:
    return next((reason for holds, reason in reasons if holds), "")


def _bias(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor | None:
    """A mask as the kernels take it: a boolean one is made into a bias of the query's type."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        zeros = torch.zeros(mask.shape, dtype=query.dtype, device=query.device)
        mask = zeros.masked_fill_(mask.logical_not(), float("-inf"))
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
