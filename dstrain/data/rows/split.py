"""The validation split: documents chosen by a hash of their number, the same every time."""

from __future__ import annotations

import math

import numpy as np

from dstrain.data.rows.order import splitmix64
from dstrain.data.rows.packing import TokenStream

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
    out = np.zeros(documents, dtype=bool)
    out[_hash_order(documents)[: _share(validation, documents)]] = True
    return _chosen(stream, ~out), _chosen(stream, out)


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
    numbers = np.arange(documents, dtype=np.uint64) ^ np.uint64(_SALT)
    return np.argsort(splitmix64(numbers), kind="stable")


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
