"""Sizes that a plan chooses by memory: of DeepSpeed's buckets, and of the chunks in which the loss is computed."""

from __future__ import annotations

LARGEST_BUCKET = 200_000_000
"""Elements."""

LIVE_PARAMETERS = 1_000_000_000
"""Elements that ZeRO-3 may keep gathered, at least; where a bucket is larger, that many."""

PREFETCH_BUCKET = 50_000_000
"""Elements that ZeRO-3 gathers ahead, at most."""

SUB_GROUP = 1_000_000_000
"""Elements that ZeRO-3's optimizer works on at a time, at most: DeepSpeed's default."""

TILE = 128
"""Rows that a GPU's matrix multiplication works on at a time: a chunk of the loss has a multiple of them."""

LOGITS = 256 * 2**20
"""Bytes of logits in fp32 that are made at a time."""


def bucket_size(stage_parameters: int) -> int:
    """Elements of a bucket that holds the largest stage's parameters, an even number, where that is not too many.

    DeepSpeed's default of 5e8 would be allocated whole: 2 GB for a model of one million parameters.
    """
    return min(2 * ((stage_parameters + 1) // 2), LARGEST_BUCKET)


def persistence_threshold(stage_parameters: int) -> int:
    """Elements of a parameter that ZeRO-3 keeps whole on every rank, at most: DeepSpeed's default, or a hundredth of a
    small stage's."""
    return min(stage_parameters // 100, 100_000)


def loss_chunk(micro_batch: int, seq_len: int, vocab_size: int, *, tokenwise: bool = True) -> int:
    """Tokens of a chunk, whose logits are computed again in the backward pass; 0: all at once, and kept.

    4k tokens with a vocabulary of 128k words take 2 GB of logits in fp32, and their gradients as much again.

    Args:
        tokenwise: whether the model's head looks at each token by itself; otherwise there are no chunks.
    """
    if not tokenwise or micro_batch * seq_len * vocab_size * 4 <= LOGITS:
        return 0
    rows = max(1, LOGITS // (4 * vocab_size))
    return rows - rows % TILE if rows > TILE else rows
