"""The hash behind sample order and validation split: splitmix64, our own so that it never changes."""

from __future__ import annotations

import numpy as np

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
