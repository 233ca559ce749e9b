"""The sample order: the rows of a step as a pure function of (rows, global batch, seed, step).

The hash behind it, and behind the validation split, is splitmix64: our own, so that it never changes.
"""

from __future__ import annotations

import numpy as np

_ROUNDS = 8


class SampleOrder:
    """The order in which training reads its rows: a fresh shuffle each epoch, without a gap between epochs.

    The samples of the run stand in one endless line: position p is in epoch ``p // rows``, and step k takes
    the positions ``(k - 1) * global_batch`` up to ``k * global_batch``. A batch may straddle epochs, so no
    row is dropped.

    The shuffle is a permutation that is computed, not stored, so a resumed run needs only its step, and it is
    our own, since NumPy's generators may change their streams between versions (NEP 19).

    Args:
        rows: how many rows there are, at least 1.
        global_batch: rows per step over all replicas and micro-batches, at least 1.
        seed: any integer; taken modulo 2**64.
    """

    def __init__(self, rows: int, global_batch: int, seed: int) -> None:
        if rows < 1 or global_batch < 1:
            raise ValueError(f"rows and global_batch must be at least 1, not {rows} and {global_batch}")
        self.rows = rows
        self.global_batch = global_batch
        self.seed = seed

    def sample_ids(self, step: int) -> np.ndarray:
        """The rows of the step's global batch: int64 [global_batch], steps counted from 1."""
        if step < 1:
            raise ValueError(f"steps are counted from 1, not {step}")
        first = (step - 1) * self.global_batch
        places = np.arange(first, first + self.global_batch, dtype=np.int64)
        return shuffled_rows(places, self.rows, self.seed)

    def given_before(self, step: int) -> list[int]:
        """How many rows were given before the step, epoch after epoch."""
        return [(step - 1) * self.global_batch]


def shuffled_rows(places: np.ndarray, rows: int, seed: int, *key: int) -> np.ndarray:
    """The rows at these places of an endless line of epochs, each a fresh shuffle: int64 [n], ascending -> int64 [n].

    Args:
        rows: of an epoch.
        key: makes it another shuffle than that of the seed alone.
    """
    ids = np.empty(places.size, dtype=np.int64)
    epochs = places // rows
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        inner = (places[here] - epoch * rows).astype(np.uint64)
        ids[here] = permute(inner, rows, hash_words(seed, *key, epoch))
    return ids


def dealt(ids: np.ndarray, *, replica: int, replicas: int, micro_batch: int) -> list[np.ndarray]:
    """What one replica gets of a global batch: one int64 [micro_batch] for each of its accumulation steps.

    Micro-batch m of replica r is the block ``m * replicas + r`` of the global batch, so that what has been read after m
    micro-batches does not depend on how many replicas read it.
    """
    accumulation, rest = divmod(ids.size, replicas * micro_batch)
    if rest:
        raise ValueError(
            f"a global batch of {ids.size} can't be dealt to {replicas} replicas "
            f"in micro-batches of {micro_batch}"
        )
    if not 0 <= replica < replicas:
        raise ValueError(f"replica {replica} is not in 0..{replicas - 1}")
    blocks = ids.reshape(accumulation, replicas, micro_batch)
    return [blocks[m, replica] for m in range(accumulation)]


def permute(places: np.ndarray, size: int, key: int) -> np.ndarray:
    """Where a keyed permutation of 0..size-1 sends each place, all below `size`: uint64 [n] -> int64 [n].

    A balanced Feistel network (Luby and Rackoff 1988) over the smallest even number of bits that holds
    `size`, made to fit by cycle walking: what falls outside is encrypted again until it falls inside (Black
    and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002). The network's domain is less than 4 *
    size, so a place takes under 4 passes on average.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    keys = splitmix64(splitmix64(np.arange(_ROUNDS, dtype=np.uint64)) ^ np.uint64(key))  # one a round
    values = _feistel(places, half, keys)
    outside = np.flatnonzero(values >= size)
    while outside.size:
        values[outside] = _feistel(values[outside], half, keys)
        outside = outside[values[outside] >= size]
    return values.astype(np.int64)


def _feistel(values: np.ndarray, half: int, keys: np.ndarray) -> np.ndarray:
    """One pass over words of 2 * `half` bits: uint64 [n] -> uint64 [n], a bijection of them."""
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (splitmix64(right ^ key) & mask)
    joined: np.ndarray = (left << shift) | right
    return joined


_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def splitmix64(values: np.ndarray) -> np.ndarray:
    """One output of splitmix64 for each state: uint64 [...] -> uint64 [...], a bijection of 64-bit words.

    Source: Sebastiano Vigna, https://prng.di.unimi.it/splitmix64.c (public domain), after Steele, Lea and
    Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014. NumPy's unsigned arrays wrap modulo
    2**64.
    """
    z: np.ndarray = values + np.uint64(_GOLDEN)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return z


def hash_words(*words: int) -> int:
    """A 64-bit hash of a sequence of integers (each taken modulo 2**64): splitmix64 chained over them."""
    state = np.zeros(1, dtype=np.uint64)
    for word in words:
        state = splitmix64(state ^ np.array([word & _MASK], dtype=np.uint64))
    return int(state[0])
