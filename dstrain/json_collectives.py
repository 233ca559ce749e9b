"""Collectives of plain values: JSON in byte tensors.

torch's ``broadcast_object_list`` and ``all_gather_object`` send pickles, and a rank runs what the pickle of another
names. JSON holds data alone. All ranks together speak through `dstrain.control_group`.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import distributed

from dstrain.control_group import control_group

MOST_BYTES = 2**26
"""Of one rank's value. What is sent is names, sizes and reasons; a longer announcement is none of ours."""


def broadcast_json(value: Any, src: int = 0) -> Any:
    """Rank ``src``'s value, on every rank. Collective.

    Args:
        value: what `json.dumps` takes; only that of ``src`` counts. Tuples arrive as lists.

    Raises:
        RuntimeError: it takes more than `MOST_BYTES`, or what arrives is no JSON; on every rank.
    """
    device, group = torch.device("cpu"), control_group()
    mine = _encoded(value, device) if distributed.get_rank() == src else torch.empty(0, dtype=torch.uint8)
    length = torch.tensor([mine.numel()], dtype=torch.int64, device=device)
    distributed.broadcast(length, src=src, group=group)
    count = _checked(int(length.item()), src)
    content = mine if distributed.get_rank() == src else torch.empty(count, dtype=torch.uint8, device=device)
    distributed.broadcast(content, src=src, group=group)
    return _decoded(content, src)


def all_gather_json(value: Any, group: Any = None) -> list[Any]:
    """The value of each rank of ``group``, by its rank in it. Collective.

    Args:
        value: what `json.dumps` takes. Tuples arrive as lists, also one's own.
        group: None: all ranks.

    Raises:
        RuntimeError: one takes more than `MOST_BYTES`, or what arrives is no JSON.
    """
    device = torch.device("cpu") if group is None else _device(group)
    group = control_group() if group is None else group
    mine = _encoded(value, device)
    ranks = distributed.get_world_size(group)
    announced = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(ranks)]
    distributed.all_gather(
        announced, torch.tensor([mine.numel()], dtype=torch.int64, device=device), group=group
    )
    lengths = [_checked(int(length.item()), rank) for rank, length in enumerate(announced)]
    longest = max(lengths)
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: mine.numel()] = mine
    contents = [torch.empty(longest, dtype=torch.uint8, device=device) for _ in range(ranks)]
    distributed.all_gather(contents, padded, group=group)
    return [
        _decoded(content[:length], rank)
        for rank, (content, length) in enumerate(zip(contents, lengths, strict=True))
    ]


def _device(group: Any) -> torch.device:
    """Where the group's backend takes tensors."""
    if "gloo" in distributed.get_backend(group):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _encoded(value: Any, device: torch.device) -> torch.Tensor:
    """uint8 [bytes]. What is too long is announced all the same, so that all ranks refuse it."""
    content = json.dumps(value).encode()
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).to(device)


def _checked(length: int, rank: int) -> int:
    if not 0 < length <= MOST_BYTES:
        raise RuntimeError(f"rank {rank} announced a message of {length:,} bytes")
    return length


def _decoded(content: torch.Tensor, rank: int) -> Any:
    try:
        return json.loads(content.cpu().numpy().tobytes())
    except (ValueError, RecursionError) as error:
        raise RuntimeError(f"what rank {rank} sent is no JSON: {error}") from None
