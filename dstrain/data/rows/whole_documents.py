"""Rows that hold whole documents, none of them cut, with as little padding as a best-fit packing leaves."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import numpy as np

from dstrain.data.rows.packing import IGNORED, Batch, TokenStream, check_stream, checked_rows

_WINDOW = 2**16
"""Documents that are packed together: memory and time do not grow with the square of a corpus."""
_COUNTED = 2**22
"""Tokens whose bits are unpacked at once."""


@dataclass(frozen=True)
class Fitted:
    """A stream whose documents fit into a row, and how many were cut or left out for that."""

    stream: TokenStream
    cut: int
    dropped: int


def fit(stream: TokenStream, seq_len: int, too_long: str) -> Fitted:
    """The stream without documents of more than ``seq_len`` tokens.

    Args:
        too_long: ``cut``: they end there, and those of which nothing is left to predict are left out; ``drop``: they
            are left out.
    """
    longer = stream.lengths > seq_len
    lengths = np.minimum(stream.lengths, seq_len)
    kept = label_counts(TokenStream(stream.tokens, stream.starts, lengths, stream.trained)) > 0
    if too_long != "cut":
        kept &= ~longer
    dropped = int((~kept).sum())
    found = TokenStream(stream.tokens, stream.starts[kept], lengths[kept], stream.trained)
    return Fitted(found, int((longer & kept).sum()), dropped)


def label_counts(stream: TokenStream) -> np.ndarray:
    """How many labels each document has: those of its tokens that are to be predicted, but for the first: int64
    [documents]."""
    counts = np.zeros(stream.lengths.size, dtype=np.int64)
    if stream.trained is None:
        return stream.lengths - 1
    first = 0
    ends = np.cumsum(stream.lengths)
    while first < counts.size:
        done = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, done + _COUNTED, side="right")))
        places = _places(stream.starts[first:last], stream.lengths[first:last])
        bits = is_trained(stream.trained, places).astype(np.int64)
        begins = np.cumsum(stream.lengths[first:last]) - stream.lengths[first:last]
        bits[begins] = 0
        counts[first:last] = np.add.reduceat(bits, begins)
        first = last
    return counts


def is_trained(bits: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Whether the tokens at these places of the file are to be predicted: uint8 [file tokens / 8], int [n] -> bool."""
    found: np.ndarray = (bits[places >> 3] >> (places & 7).astype(np.uint8)) & 1 == 1
    return found


def _places(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The places of all tokens of documents, one document behind the other."""
    begins = np.cumsum(lengths) - lengths
    places: np.ndarray = np.arange(int(lengths.sum())) + np.repeat(starts - begins, lengths)
    return places


class WholeDocumentRows:
    """Each row holds documents of a stream, whole, and padding behind them.

    The padding is end-of-document tokens without labels. It comes last, so that no token of a causal model sees it, and
    positions count on through it, so that nothing takes it for a document.

    Args:
        stream: its documents have at most ``seq_len`` tokens.
        padding: the token to fill rows up with.
        pack: several documents in a row; else one.
    """

    def __init__(self, stream: TokenStream, seq_len: int, padding: int, *, pack: bool = True) -> None:
        check_stream(stream, seq_len)
        if stream.lengths.size and stream.lengths.max() > seq_len:
            raise ValueError(
                f"a document of {stream.lengths.max()} tokens does not fit into a row of {seq_len}"
            )
        self.seq_len = seq_len
        self._stream = stream
        self._fill = padding
        if pack:
            self._order, self._ends = best_fit(stream.lengths, seq_len)
        else:
            self._order = np.arange(stream.lengths.size)
            self._ends = self._order + 1
        self._label_tokens = self._of_rows(label_counts(stream))
        self._filled = self._of_rows(stream.lengths)

    def _of_rows(self, numbers: np.ndarray) -> np.ndarray:
        """The sums of numbers of documents over the rows: int64 [documents] -> int64 [rows]."""
        sums = np.concatenate([[0], np.cumsum(numbers[self._order])])
        return np.diff(sums[np.concatenate([[0], self._ends])])

    def __len__(self) -> int:
        return int(self._ends.size)

    def rows(self, ids: np.ndarray) -> Batch:
        """The rows with these numbers: int [n] -> three int64 [n, seq_len]. IndexError if there is none."""
        ids = checked_rows(ids, len(self))
        shape = (ids.size, self.seq_len)
        input_ids = np.full(shape, self._fill, dtype=np.int64)
        position_ids = np.zeros(shape, dtype=np.int64)
        labels = np.full(shape, IGNORED, dtype=np.int64)
        for at, row in enumerate(ids):
            documents = self._order[self._ends[row - 1] if row else 0 : self._ends[row]]
            starts, lengths = self._stream.starts[documents], self._stream.lengths[documents]
            places = _places(starts, lengths)
            size = places.size
            tokens = self._stream.tokens[places].astype(np.int64)
            begins = np.cumsum(lengths) - lengths
            predicted = np.ones(size, bool)
            if self._stream.trained is not None:
                predicted = is_trained(self._stream.trained, places)
            predicted[begins] = False
            input_ids[at, :size] = tokens
            labels[at, : size - 1] = np.where(predicted[1:], tokens[1:], IGNORED)
            position_ids[at] = np.arange(self.seq_len)
            position_ids[at, :size] -= np.repeat(begins, lengths)
            position_ids[at, size:] -= begins[-1]
        return Batch(input_ids, position_ids, labels)

    def label_tokens(self, ids: np.ndarray) -> np.ndarray:
        """How many labels of each of these rows count in the loss: int [n] -> int64 [n]."""
        counts: np.ndarray = self._label_tokens[checked_rows(ids, len(self))]
        return counts

    def filled(self, ids: np.ndarray) -> np.ndarray:
        """How many tokens of each of these rows are not padding: int [n] -> int64 [n]."""
        counts: np.ndarray = self._filled[checked_rows(ids, len(self))]
        return counts

    @property
    def padding(self) -> float:
        """The share of tokens that only fill rows up."""
        return 1.0 - float(self._stream.size) / max(1, len(self) * self.seq_len)


def best_fit(lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Packs documents into rows: the longest first, each into the fullest row that still takes it.

    Documents are packed in windows of their order, so that neither memory nor time grows faster than the corpus.

    Args:
        lengths: int64 [documents], at most ``seq_len`` each.

    Returns:
        The documents in the order of their rows, int64 [documents], and where in it each row ends, int64 [rows].
    """
    order, ends = array("q"), array("q")
    for first in range(0, lengths.size, _WINDOW):
        window = lengths[first : first + _WINDOW]
        rows: list[list[int]] = []
        with_space: dict[int, list[int]] = {}
        spaces = 0  # a bit for each amount of space that some row has
        for document in np.argsort(-window, kind="stable").tolist():
            length = int(window[document])
            fitting = spaces >> length
            if fitting:
                space = length + (fitting & -fitting).bit_length() - 1
                row = with_space[space].pop()
                if not with_space[space]:
                    spaces &= ~(1 << space)
            else:
                space, row = seq_len, len(rows)
                rows.append([])
            rows[row].append(first + document)
            left = space - length
            if left:
                with_space.setdefault(left, []).append(row)
                spaces |= 1 << left
        for documents in rows:
            order.extend(documents)
            ends.append(len(order))
    return np.array(order, dtype=np.int64), np.array(ends, dtype=np.int64)
