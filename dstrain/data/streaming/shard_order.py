"""In which order the shards of a stream come."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dstrain.data.rows.order import hash_words, permute

SHARDS, DOCUMENTS, ROWS = range(3)
"""What is shuffled by the seed, each with a key of its own."""


def order_of_shards(seed: int, epoch: int, count: int) -> np.ndarray:
    """The shards' numbers in the order of an epoch: int64 [count]."""
    return permute(np.arange(count, dtype=np.uint64), count, hash_words(seed, epoch, SHARDS))


def shards_from(seed: int, epoch: int, position: int, count: int) -> Iterator[int]:
    """The shards' numbers from a position in an epoch on, epoch after epoch without an end."""
    while True:
        yield from order_of_shards(seed, epoch, count)[position:].tolist()
        epoch, position = epoch + 1, 0
