"""torch's own flash attention for rows of several documents, as an attention implementation of transformers.

It takes the documents' lengths in place of a mask, and keys and values with their own number of heads. With sdpa each
call has a mask of S x S, for which torch has no flash kernel, and keys and values are repeated to all heads.

Sources: ``torch.nn.attention.varlen.varlen_attn`` (torch 2.13); transformers' ``flash_attention_forward``, whose
arguments are these.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface

VARLEN = "varlen"
"""Its name in a config, here and for transformers. Without a mask function of this name, families get no mask."""

LARGEST_HEAD = 256
"""Elements of a head that the kernel takes at most."""

_MULTIPLE = 8
"""Heads are filled up with zeros to a multiple of it."""


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention of each document to itself.

    On CPUs it computes the same by ``scaled_dot_product_attention``, a document at a time, for tests and trials.

    Args:
        query: [B, heads, S, D].
        key, value: [B, heads, S, D], or fewer heads for groups of queries; values may have another D.
        attention_mask: None.
        sliding_window: positions that a token sees, its own with them; None: all before it.
        cu_seq_lens_q: int32 [documents + 1], see `dstrain.model.document_lengths`; None: each row is a document.
        max_length_q: tokens of the longest document.

    Returns:
        [B, S, heads, D of the values] and None.

    Raises:
        ValueError: the family wants what the kernel does not have.
    """
    wanted = [name for name in ("softcap", "s_aux", "position_bias") if others.get(name) is not None]
    wanted += ["dropout"] * (dropout > 0) + ["a mask"] * (attention_mask is not None)
    causal = others.get("is_causal")
    wanted += ["tokens that see later ones"] * (
        not (getattr(module, "is_causal", True) if causal is None else causal)
    )
    if wanted:
        raise ValueError(f"varlen attention has no {wanted[0]}")
    rows, _, length, width = query.shape
    if cu_seq_lens_q is None or max_length_q is None:
        cu_seq_lens_q = torch.arange(0, (rows + 1) * length, length, dtype=torch.int32, device=query.device)
        max_length_q = length
    of_values = value.shape[-1]
    wide = -(-max(width, of_values) // _MULTIPLE) * _MULTIPLE
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    attend = _by_document if query.device.type == "cpu" else _by_kernel
    output = attend(
        _laid_end_to_end(query, wide),
        _laid_end_to_end(key, wide),
        _laid_end_to_end(value, wide),
        cu_seq_lens_q,
        max_length_q,
        width**-0.5 if scaling is None else scaling,
        window,
    )
    return output[..., :of_values].unflatten(0, (rows, length)).contiguous(), None


def _laid_end_to_end(state: Tensor, width: int) -> Tensor:
    """[B, heads, S, D] -> [B * S, heads, width]"""
    return functional.pad(state, (0, width - state.shape[-1])).transpose(1, 2).flatten(0, 1)


def _by_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    edges: Tensor,
    longest: int,
    scale: float,
    window: tuple[int, int],
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # here: older versions have another one

    output = varlen_attn(
        query,
        key,
        value,
        edges,
        edges,
        longest,
        longest,
        scale=scale,
        window_size=window,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, Tensor)  # nothing else was asked for
    return output


def _by_document(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    edges: Tensor,
    longest: int,
    scale: float,
    window: tuple[int, int],
) -> Tensor:
    """What the kernel computes, [T, heads, D] each."""
    lengths = edges.diff().tolist()
    parts = zip(*(state.transpose(0, 1).split(lengths, dim=1) for state in (query, key, value)), strict=True)
    outputs = []
    for length, (of_query, of_key, of_value) in zip(lengths, parts, strict=True):
        place = torch.arange(length)
        behind = place[:, None] - place
        seen = (behind >= 0) & ((behind <= window[0]) | (window[0] < 0))
        outputs.append(
            functional.scaled_dot_product_attention(
                of_query, of_key, of_value, attn_mask=seen, scale=scale, enable_gqa=True
            )
        )
    return torch.cat(outputs, dim=1).transpose(0, 1)


AttentionInterface.register(VARLEN, varlen_attention)
