"""Packs documents into rows of equal length: several per row with labels and positions, or one per row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

IGNORED = -100  # the label that PyTorch's cross entropy leaves out


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
        self._ends = np.cumsum(stream.lengths, dtype=np.int64)  # in the stream, of each document
        # What to add to a place in the stream to get the place in the token file.
        self._to_file = np.asarray(stream.starts, dtype=np.int64) - (self._ends - stream.lengths)
        self._begins = self._ends - stream.lengths
        self._rows = stream.size // seq_len

        # Only a document's last token has no label, so a row's labels are its length less the documents
        # ending in it.
        edges = np.arange(self._rows + 1, dtype=np.int64) * seq_len
        ended = np.searchsorted(self._ends, edges, side="right")
        self._label_tokens = seq_len - np.diff(ended).astype(np.int64)

    def __len__(self) -> int:
        return self._rows

    def rows(self, ids: np.ndarray) -> Batch:
        """The rows with these numbers: int [n] -> three int64 [n, seq_len]. IndexError if there is none."""
        ids = checked_rows(ids, self._rows)
        first = ids[:, None] * self.seq_len
        place = first + np.arange(self.seq_len, dtype=np.int64)
        document = np.searchsorted(self._ends, place, side="right")
        at = place + self._to_file[document]
        last = place + 1 == self._ends[document]
        # A document's last token may be the file's last one, so there the look ahead stays where it is.
        following = self._tokens[at + ~last].astype(np.int64)
        return Batch(
            input_ids=self._tokens[at].astype(np.int64),
            position_ids=place - np.maximum(self._begins[document], first),
            labels=np.where(last, IGNORED, following),
        )

    def label_tokens(self, ids: np.ndarray) -> np.ndarray:
        """How many labels of each of these rows count in the loss: int [n] -> int64 [n]."""
        counts: np.ndarray = self._label_tokens[checked_rows(ids, self._rows)]
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
