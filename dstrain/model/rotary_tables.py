"""Rotary tables of each document by itself, where transformers makes them by the largest position of all.

With ``longrope`` the short or the long factors, and with ``dynamic`` the base, follow from the largest position that
the module is called with (transformers' ``dynamic_rope_update``). Left alone, a document's result would depend on the
other documents of its sample and on the other samples of its micro-batch, and with ``dynamic`` on those of steps
before, since the module keeps the largest it has met. Here each document gets the tables that it gets alone.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from dstrain.model.document_lengths import document_begins


def rotary_tables_by_document(model: nn.Module) -> None:
    """Make every module of ``model`` whose tables follow from the largest position give each document its own."""
    for module in model.modules():
        if _of_largest_position(module):
            module.register_forward_hook(_by_document, with_kwargs=True)


def _of_largest_position(module: nn.Module) -> bool:
    kinds = getattr(module, "rope_type", None)  # families with several kinds of blocks have one for each
    kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
    return any(isinstance(kind, str) and ("dynamic" in kind or kind == "longrope") for kind in kinds)


def _by_document(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """A forward hook: tables for the groups of documents that have the same, put together.

    A module is called ``(x, position_ids, layer_type=None)``, and its tables are [..., B, S, D].
    """
    named = "position_ids" in kwargs
    position_ids: Tensor = kwargs["position_ids"] if named else args[1]
    if position_ids.is_meta:  # only shapes matter
        return None

    def tables(positions: Tensor) -> Any:
        if named:
            return module.forward(*args, **{**kwargs, "position_ids": positions})
        return module.forward(args[0], positions, *args[2:], **kwargs)

    of_tokens = (
        position_ids[0] if position_ids.dim() == 3 else position_ids
    )  # time, height, width: equal for text
    least, most = _bounds(module, kwargs.get("layer_type", args[2] if len(args) > 2 else None))
    group = _largest_of_document(of_tokens).clamp(least, most)
    whole: Any = None
    for largest in group.unique():
        members = group == largest
        tables(position_ids[..., :1, :1] * 0)  # at position 0 the module forgets what it has met before
        part = tables(position_ids[..., members].unsqueeze(-2))
        whole = _put(part, members, whole)
    return whole


def _bounds(module: Any, layer_type: str | None) -> tuple[int, int | None]:
    """The largest positions between which tables differ: documents that end below or above share theirs."""
    kind = module.rope_type if layer_type is None else module.rope_type[layer_type]
    parameters = module.config.rope_parameters
    if layer_type is not None:
        parameters = parameters[layer_type]
    if kind == "longrope":
        first_long = int(parameters["original_max_position_embeddings"])
        return first_long - 1, first_long
    if "dynamic" in kind:
        return int(module.original_max_seq_len) - 1, None
    return 0, 0


def _largest_of_document(position_ids: Tensor) -> Tensor:
    """For each token the largest position of its document: int64 [B, S]."""
    begins = document_begins(position_ids).flatten()
    document = begins.cumsum(0) - 1
    ends = begins.roll(-1)  # the first token begins a document, so the last one ends one
    return position_ids.flatten()[ends][document].view_as(position_ids)


def _put(part: Any, members: Tensor, whole: Any) -> Any:
    """``whole`` with the tables of some tokens at their places.

    Args:
        part: tensors [..., 1, n, D].
        members: bool [B, S], n of them True.
        whole: tensors [..., B, S, D], or None: made here.
    """
    if whole is None:
        whole = tree_map(lambda leaf: leaf.new_empty(*leaf.shape[:-3], *members.shape, leaf.shape[-1]), part)

    def put(leaf: Tensor, into: Tensor) -> Tensor:
        into[..., members, :] = leaf.squeeze(-3)
        return into

    return tree_map(put, part, whole)
