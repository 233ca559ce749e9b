"""How many tokens' logits are computed at once for the loss."""

from __future__ import annotations

LOGITS = 256 * 2**20
"""Bytes of logits in fp32 that are made at a time."""


def loss_chunk(micro_batch: int, seq_len: int, vocab_size: int, *, tokenwise: bool = True) -> int:
    """Tokens of a chunk, whose logits are computed again in the backward pass; 0: all at once, and kept.

    4k tokens with a vocabulary of 128k words take 2 GB of logits in fp32, and their gradients as much again.

    Args:
        tokenwise: whether the model's head looks at each token by itself; otherwise there are no chunks.
    """
    if not tokenwise or micro_batch * seq_len * vocab_size * 4 <= LOGITS:
        return 0
    return max(1, LOGITS // (4 * vocab_size))
