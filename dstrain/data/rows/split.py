"""The validation split: documents chosen by a hash of their number, the same every time."""

from __future__ import annotations

import math

import numpy as np

from dstrain.data.rows.order import splitmix64
from dstrain.data.rows.packing import TokenStream

_BLOCK = 2**20
"""Documents that are looked at at once."""
_SALT = 0x68656C645F6F7574  # "held_out": the split must not share its hash with anything else


def split_stream(stream: TokenStream, validation: float) -> tuple[TokenStream, TokenStream | None]:
    """The stream cut into training and validation documents (None for a fraction of 0).

    The documents with the smallest hashes of their numbers are for validation, which spreads them over the corpus:
    the share `validation` of all documents, rounded, and at least one on each side. A single document is cut
    instead: its last `validation` share of tokens, at least one, is for validation.

    Args:
        stream: of at least 2 tokens.
        validation: 0 <= validation < 1.
    """
    documents = stream.lengths.size
    if validation == 0:
        return stream, None
    if documents == 1:
        return _cut_tail(stream, _share(validation, stream.size))
    out = _smallest(documents, _share(validation, documents))
    held = _chosen(stream, out)
    return _chosen(stream, np.logical_not(out, out=out)), held


def fraction_for(stream: TokenStream, tokens: int) -> float | None:
    """The smallest fraction (to 3 digits) that would hold out so many tokens; None if none below 0.5 does."""
    documents = stream.lengths.size
    if documents == 1:
        needed = tokens / stream.size
    else:
        held = np.cumsum(stream.lengths[_hash_order(documents)])
        needed = (int(np.searchsorted(held, tokens)) + 1) / documents
    # Rounded up, so that the advice holds when it is followed.
    digits = 3 - 1 - math.floor(math.log10(needed))
    fraction = math.ceil(needed * 10**digits) / 10**digits
    return fraction if fraction < 0.5 else None


def _share(fraction: float, count: int) -> int:
    """That share of `count`, rounded half up, but at least 1 on each side."""
    return min(max(math.floor(fraction * count + 0.5), 1), count - 1)


def _hash_order(documents: int) -> np.ndarray:
    """The document numbers in the order of their hashes: int64 [documents]."""
    return np.argsort(_hashes(0, documents), kind="stable")


def _smallest(documents: int, count: int) -> np.ndarray:
    """Which documents are the first `count` in the order of their hashes: bool [documents].

    No two have the same hash. Nothing is sorted, and hashes are made twice rather than kept: there may be 10^8.
    """
    hashes = np.empty(documents, dtype=np.uint64)
    blocks = [(first, min(first + _BLOCK, documents)) for first in range(0, documents, _BLOCK)]
    for first, last in blocks:
        hashes[first:last] = _hashes(first, last)
    hashes.partition(count - 1)
    largest = hashes[count - 1]
    del hashes
    out = np.empty(documents, dtype=bool)
    for first, last in blocks:
        out[first:last] = _hashes(first, last) <= largest
    return out


def _hashes(first: int, last: int) -> np.ndarray:
    """Of the numbers of documents: uint64 [last - first]."""
    return splitmix64(np.arange(first, last, dtype=np.uint64) ^ np.uint64(_SALT))


def _chosen(stream: TokenStream, which: np.ndarray) -> TokenStream:
    return TokenStream(stream.tokens, stream.starts[which], stream.lengths[which], stream.trained)


def _cut_tail(stream: TokenStream, tail: int) -> tuple[TokenStream, TokenStream]:
    """A stream of one document as its beginning and its last `tail` tokens."""
    start, head = int(stream.starts[0]), int(stream.lengths[0]) - tail

    def piece(first: int, count: int) -> TokenStream:
        return TokenStream(
            stream.tokens, np.array([first], np.int64), np.array([count], np.int64), stream.trained
        )

    return piece(start, head), piece(start + head, tail)
