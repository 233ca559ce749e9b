"""Packs documents into rows of equal length: several per row with labels and positions, or one per row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

IGNORED = -100  # the label that PyTorch's cross entropy leaves out
_BLOCK = 2**20
"""Documents that are looked at at once."""


class Batch(NamedTuple):
    """Rows, each int64 [n, seq_len]. `labels` are shifted: the token that follows, or IGNORED."""

    input_ids: np.ndarray
    position_ids: np.ndarray
    labels: np.ndarray


class TokenArray(Protocol):
    """Tokens by their places, in one array or in several files."""

    @property
    def size(self) -> int: ...

    def __getitem__(self, at: np.ndarray, /) -> np.ndarray:
        """int [...] -> whole numbers of any type [...]."""


@dataclass(frozen=True)
class TokenStream:
    """Documents laid end to end, as pieces of a token file that need not touch each other there.

    Training and validation documents can so be drawn from one file of tokens, at any sequence length.

    Attributes:
        tokens: [file tokens], any whole numbers, usually a memory map.
        starts: int64 [documents], where in `tokens` each document starts.
        lengths: int64 [documents], its tokens with its end-of-document token, at least 1.
        trained: uint8 [file tokens / 8], a bit for each token, the first in the lowest bit of a byte: whether it is to
            be predicted; None: all are.
    """

    tokens: TokenArray
    starts: np.ndarray
    lengths: np.ndarray
    trained: np.ndarray | None = None

    @property
    def size(self) -> int:
        """Tokens in the stream."""
        return int(self.lengths.sum())


class Rows(Protocol):
    """Rows of equal length, by their numbers."""

    seq_len: int

    def __len__(self) -> int: ...

    def rows(self, ids: np.ndarray) -> Batch:
        """The rows with these numbers: int [n] -> three int64 [n, seq_len]. IndexError if there is none."""

    def label_tokens(self, ids: np.ndarray) -> np.ndarray:
        """How many labels of each of these rows count in the loss: int [n] -> int64 [n]."""

    def filled(self, ids: np.ndarray) -> np.ndarray:
        """How many tokens of each of these rows are not padding: int [n] -> int64 [n]."""

    @property
    def padding(self) -> float:
        """The share of tokens that only fill rows up."""


class PackedRows:
    """Row r of a stream is its tokens ``r * seq_len`` up to ``(r + 1) * seq_len``; a last partial row is
    dropped.

    A label is the stream's next token if that belongs to the same document, else IGNORED: the last token of a
    document's content predicts the end-of-document token, which itself predicts nothing. The last position of
    a row looks into the next row. Positions count from 0 at each document's start and at each row's start.
    """

    def __init__(self, stream: TokenStream, seq_len: int) -> None:
        check_stream(stream, seq_len)
        self.seq_len = seq_len
        self._tokens = stream.tokens
        # Of each of 10^8 documents there is one number, and what else is needed follows from it.
        self._ends = np.cumsum(stream.lengths, dtype=np.int64)  # in the stream
        self._rows = int(self._ends[-1]) // seq_len if self._ends.size else 0
        # Where documents lie behind each other in the token file, places there are those in the stream and a constant.
        first = _first_of_runs(stream)
        self._runs = self._begins(first)  # where in the stream each run begins
        self._to_file = np.asarray(stream.starts[first], dtype=np.int64) - self._runs

    def __len__(self) -> int:
        return self._rows

    def _begins(self, documents: np.ndarray) -> np.ndarray:
        """Where in the stream these documents begin: int64 of any shape."""
        begins: np.ndarray = np.where(documents > 0, self._ends[documents - 1], 0)
        return begins

    def rows(self, ids: np.ndarray) -> Batch:
        """The rows with these numbers: int [n] -> three int64 [n, seq_len]. IndexError if there is none."""
        ids = checked_rows(ids, self._rows)
        first = ids[:, None] * self.seq_len
        place = first + np.arange(self.seq_len, dtype=np.int64)
        document = np.searchsorted(self._ends, place, side="right")
        at = place + self._to_file[np.searchsorted(self._runs, place, side="right") - 1]
        last = place + 1 == self._ends[document]
        # A document's last token may be the file's last one, so there the look ahead stays where it is.
        following = self._tokens[at + ~last].astype(np.int64)
        return Batch(
            input_ids=self._tokens[at].astype(np.int64),
            position_ids=place - np.maximum(self._begins(document), first),
            labels=np.where(last, IGNORED, following),
        )

    def label_tokens(self, ids: np.ndarray) -> np.ndarray:
        """How many labels of each of these rows count in the loss: int [n] -> int64 [n]."""
        first = checked_rows(ids, self._rows) * self.seq_len
        # Only a document's last token has no label, so a row's labels are its length less the documents ending in it.
        before, within = (
            np.searchsorted(self._ends, edge, side="right") for edge in (first, first + self.seq_len)
        )
        counts: np.ndarray = (self.seq_len - (within - before)).astype(np.int64)
        return counts

    def filled(self, ids: np.ndarray) -> np.ndarray:
        """All tokens are text: int [n] -> int64 [n]."""
        return np.full(checked_rows(ids, self._rows).shape, self.seq_len)

    @property
    def padding(self) -> float:
        """The share of tokens that only fill rows up: none."""
        return 0.0


class SeparateRows:
    """Each row holds one document of a stream, or where that is longer, the next ``seq_len`` tokens of one.

    The rest of a row is padding: end-of-document tokens without labels. It comes last, so that no token of a causal
    model sees it, and positions count on through it, so that nothing takes it for a document. What counts all tokens
    of a row alike counts it too: the router loss of a mixture of experts, and the time that a step takes.

    Labels are those of `PackedRows`. What would be a row without any (a document's end-of-document token alone) is
    left out; no label is.

    Args:
        padding: the token to fill rows up with.
    """

    def __init__(self, stream: TokenStream, seq_len: int, padding: int) -> None:
        check_stream(stream, seq_len)
        self.seq_len = seq_len
        self._stream = stream
        self._fill = padding
        # All of a document's tokens but the last one have a label, and each row takes seq_len labels but the last.
        rows = -(-(stream.lengths - 1) // seq_len)
        self._ends = np.cumsum(rows, dtype=np.int64)  # in rows, of each document
        self._rows = int(self._ends[-1]) if self._ends.size else 0

    def __len__(self) -> int:
        return self._rows

    def rows(self, ids: np.ndarray) -> Batch:
        """The rows with these numbers: int [n] -> three int64 [n, seq_len]. IndexError if there is none."""
        start, left = self._pieces(checked_rows(ids, self._rows))
        place = np.arange(self.seq_len, dtype=np.int64)
        is_token, has_label = place < left[:, None], place + 1 < left[:, None]
        at = start[:, None] + place
        return Batch(
            input_ids=self._tokens(at, is_token, self._fill),
            position_ids=np.broadcast_to(place, at.shape),
            labels=self._tokens(at + 1, has_label, IGNORED),
        )

    def label_tokens(self, ids: np.ndarray) -> np.ndarray:
        """How many labels of each of these rows count in the loss: int [n] -> int64 [n]."""
        _, left = self._pieces(checked_rows(ids, self._rows))
        counts: np.ndarray = np.minimum(left - 1, self.seq_len)
        return counts

    def filled(self, ids: np.ndarray) -> np.ndarray:
        """How many tokens of each of these rows are not padding: int [n] -> int64 [n]."""
        _, left = self._pieces(checked_rows(ids, self._rows))
        counts: np.ndarray = np.minimum(left, self.seq_len)
        return counts

    @property
    def padding(self) -> float:
        """The share of tokens that only fill rows up."""
        if not self._rows:
            return 0.0
        return 1.0 - float(self.filled(np.arange(self._rows)).mean()) / self.seq_len

    def _pieces(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where in the token file each of these rows begins, and how many tokens its document has from there."""
        document = np.searchsorted(self._ends, ids, side="right")
        first_row = np.concatenate([[0], self._ends])[document]
        skipped = (ids - first_row) * self.seq_len
        return self._stream.starts[document] + skipped, self._stream.lengths[document] - skipped

    def _tokens(self, at: np.ndarray, there: np.ndarray, otherwise: int) -> np.ndarray:
        """The tokens at places of the file, or ``otherwise`` where they are not ``there``."""
        return np.where(there, self._stream.tokens[np.where(there, at, 0)].astype(np.int64), otherwise)


def _first_of_runs(stream: TokenStream) -> np.ndarray:
    """Which documents do not lie right behind the one before them in the token file: int64 [runs], the first is 0."""
    found = [np.zeros(min(stream.lengths.size, 1), np.int64)]
    for at in range(1, stream.lengths.size, _BLOCK):
        last = min(at + _BLOCK, stream.lengths.size)
        behind = stream.starts[at - 1 : last - 1] + stream.lengths[at - 1 : last - 1]
        found.append(at + np.flatnonzero(stream.starts[at:last] != behind))
    return np.concatenate(found)


def check_stream(stream: TokenStream, seq_len: int) -> None:
    """Raises ValueError for what can't be put into rows."""
    if seq_len < 1:
        raise ValueError(f"seq_len must be at least 1, not {seq_len}")
    if stream.lengths.size and stream.lengths.min() < 1:
        raise ValueError("a document without tokens can't be put into a row")


def checked_rows(ids: np.ndarray, rows: int) -> np.ndarray:
    """Numbers of rows as int64. Raises IndexError where there are not so many."""
    ids = np.asarray(ids, dtype=np.int64)
    if ids.size and (ids.min() < 0 or ids.max() >= rows):
        raise IndexError(f"rows {ids.min()}..{ids.max()} are asked for, and there are {rows}")
    return ids
