"""Makes rows of a stream's blocks, with the state from which each group of rows can be made again."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dstrain.data.chat.corpus import ConversationSource
from dstrain.data.rows.order import hash_words, permute
from dstrain.data.rows.packing import PackedRows, Rows, SeparateRows, TokenStream
from dstrain.data.rows.whole_documents import WholeDocumentRows, fit
from dstrain.data.streaming.blocks import Block, read_blocks
from dstrain.data.streaming.encoding import BlockEncoder, EncodedBlock
from dstrain.data.streaming.shard_order import DOCUMENTS, ROWS
from dstrain.data.streaming.state import Place, StreamState
from dstrain.data.streaming.stream import Stream
from dstrain.errors import DstrainError


@dataclass(frozen=True)
class MadeRows:
    """Rows that were made together.

    Attributes:
        rows: them, and maybe more.
        order: which of them, in the order in which they are trained on: int64 [n], n at least 1.
        state: from which they are made again; its ``first`` is the number of the first of them.
        after: the same of what follows.
    """

    rows: Rows
    order: np.ndarray
    state: StreamState
    after: StreamState


def make_rows(stream: Stream, state: StreamState, workers: int = 0) -> Iterator[MadeRows]:
    """The rows from ``state.first`` on, without an end: what was made before ``state.row`` comes once more.

    Args:
        workers: processes that tokenize; 0: this one.

    Raises:
        DstrainError: see `read_blocks` and `BlockEncoder.encode`; or an epoch has no rows.
    """
    making = _maker(stream, state)
    begun, rows_before = state.place, state.first
    with BlockEncoder(stream, workers) as encoder:
        for encoded in encoder.encode(read_blocks(stream, state.place)):
            for reason in encoded.reasons:
                print(f"left out: {reason}", file=sys.stderr)
            made = making.add(encoded)
            if made is not None:
                yield made
            after = encoded.block.after
            if after.epoch > begun.epoch:
                _check_epoch(stream, begun, making, rows_before)
                begun, rows_before = after, making.number


def _check_epoch(stream: Stream, begun: Place, making: _Maker, rows_before: int) -> None:
    """An epoch that adds nothing would be followed by others without an end."""
    if begun == Place(begun.epoch) and making.number == rows_before and not making.waiting:
        raise DstrainError(
            "no row can be made of this source: its documents are empty, or were all left out",
            where=stream.corpus.place,
            hint="check its records; too_long: cut keeps the beginnings of long conversations",
        )


def _maker(stream: Stream, state: StreamState) -> _Maker:
    if isinstance(stream.corpus, ConversationSource):
        return _WholeDocuments(stream, state)
    return _RunningText(stream, state) if stream.request.pack else _SeparateDocuments(stream, state)


class _Maker(ABC):
    """Takes block after block.

    Attributes:
        number: of the next row.
    """

    def __init__(self, stream: Stream, state: StreamState) -> None:
        self._stream = stream
        self._request = stream.request
        self.number = state.first

    @property
    def waiting(self) -> bool:
        """Whether there are tokens that are in no row yet."""
        return False

    @abstractmethod
    def add(self, encoded: EncodedBlock) -> MadeRows | None:
        """The rows that can be made when this block is there; None if there are none."""

    def _order(self, count: int, what: int, block: Block) -> np.ndarray:
        """The order of so many things of a block."""
        key = hash_words(self._request.seed, block.place.epoch, what, block.place.block)
        return permute(np.arange(count, dtype=np.uint64), count, key)

    def _made(self, rows: Rows, count: int, block: Block, begin: StreamState, after: StreamState) -> MadeRows:
        self.number += count
        return MadeRows(rows, self._order(count, ROWS, block), begin, after)


class _WholeBlocks(_Maker):
    """Rows of one block at a time."""

    def add(self, encoded: EncodedBlock) -> MadeRows | None:
        block = encoded.block
        if not encoded.lengths.size:
            return None
        order = self._order(encoded.lengths.size, DOCUMENTS, block)
        starts = np.cumsum(encoded.lengths) - encoded.lengths
        trained = None
        if encoded.trained is not None:
            trained = np.packbits(encoded.trained, bitorder="little")
        rows = self._rows(TokenStream(encoded.tokens, starts[order], encoded.lengths[order], trained))
        count = len(rows)
        if not count:
            return None
        begin = StreamState(block.place, 0, self.number, self.number)
        after = StreamState(block.after, 0, self.number + count, self.number + count)
        return self._made(rows, count, block, begin, after)

    @abstractmethod
    def _rows(self, documents: TokenStream) -> Rows:
        """The rows that hold these documents."""


class _WholeDocuments(_WholeBlocks):
    """Conversations, none of them cut where that was not said."""

    def _rows(self, documents: TokenStream) -> Rows:
        assert isinstance(self._stream.corpus, ConversationSource)
        fitted = fit(documents, self._request.seq_len, self._stream.corpus.options.too_long)
        padding = self._stream.tokenizer.end_of_document
        return WholeDocumentRows(fitted.stream, self._request.seq_len, padding, pack=self._request.pack)


class _SeparateDocuments(_WholeBlocks):
    """A document a row. One that is divided into parts for its length counts as several."""

    def _rows(self, documents: TokenStream) -> Rows:
        return SeparateRows(documents, self._request.seq_len, self._stream.tokenizer.end_of_document)


class _RunningText(_Maker):
    """Documents end to end, cut into rows. What is left of a block goes in front of the next one."""

    def __init__(self, stream: Stream, state: StreamState) -> None:
        super().__init__(stream, state)
        self._skip = state.skip
        self._left = np.zeros(0, stream.tokenizer.dtype)
        self._left_lengths = np.zeros(0, np.int64)
        self._open = False  # whether the last of what is left is of a text that goes on
        # Where the tokens that are left came from: blocks, how many tokens of them are in rows, and how many are left.
        self._origins: deque[tuple[Place, int, int]] = deque()

    @property
    def waiting(self) -> bool:
        return self._left.size > 0

    def add(self, encoded: EncodedBlock) -> MadeRows | None:
        block = encoded.block
        starts, lengths = self._shuffled(encoded)
        count = int(lengths.sum())
        if count:
            self._origins.append((block.place, self._skip, count))
        self._skip = 0
        tokens = np.concatenate([self._left, encoded.tokens])
        starts = np.concatenate(
            [np.cumsum(self._left_lengths) - self._left_lengths, starts + self._left.size]
        )
        lengths = np.concatenate([self._left_lengths, lengths])
        if block.continues and self._open and count:  # one document, and its two parts lie side by side
            joined = self._left_lengths.size - 1
            starts = np.delete(starts, joined + 1)
            lengths[joined] += lengths[joined + 1]
            lengths = np.delete(lengths, joined + 1)
        self._open = block.unfinished and (count > 0 or self._open)
        # The last position of a row looks at the token behind it, which of an unfinished text must be there.
        taken = max(0, int(lengths.sum()) - block.unfinished) // self._request.seq_len * self._request.seq_len
        made = None
        if taken:
            rows = PackedRows(TokenStream(tokens, starts, lengths), self._request.seq_len)
            made = self._take(rows, taken, block)
        starts, lengths = _behind(starts, lengths, taken)
        parts = [tokens[start : start + length] for start, length in zip(starts, lengths, strict=True)]
        self._left, self._left_lengths = np.concatenate([*parts, tokens[:0]]), lengths
        return made

    def _shuffled(self, encoded: EncodedBlock) -> tuple[np.ndarray, np.ndarray]:
        """Where the block's documents begin, and their lengths, in their order; without what is in rows already."""
        size = encoded.lengths.size
        if not size:
            return encoded.lengths, encoded.lengths
        order = self._order(size, DOCUMENTS, encoded.block)
        starts = np.cumsum(encoded.lengths) - encoded.lengths
        if self._skip >= encoded.tokens.size:
            raise DstrainError(
                f"the stream has fewer tokens than it had: {encoded.tokens.size:,} where {self._skip:,} were in rows",
                where=self._stream.corpus.place,
                hint="a stream needs files that stay as they are: start a new run for changed data",
            )
        return _behind(starts[order], encoded.lengths[order], self._skip)

    def _take(self, rows: Rows, taken: int, block: Block) -> MadeRows:
        """The rows that so many tokens fill."""
        count = taken // self._request.seq_len
        place, skip, _ = self._origins[0]
        begin = StreamState(place, skip, self.number, self.number)
        while self._origins and taken >= self._origins[0][2]:
            taken -= self._origins.popleft()[2]
        if taken:
            place, skip, left = self._origins[0]
            self._origins[0] = (place, skip + taken, left - taken)
        place, skip = self._origins[0][:2] if self._origins else (block.after, 0)
        after = StreamState(place, skip, self.number + count, self.number + count)
        return self._made(rows, count, block, begin, after)


def _behind(starts: np.ndarray, lengths: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Documents without their first ``count`` tokens, which are at most all: starts and lengths, int64 [documents]."""
    ends = np.cumsum(lengths)
    first = int(np.searchsorted(ends, count, side="right"))
    starts, lengths = starts[first:].copy(), lengths[first:].copy()
    if starts.size:
        cut = count - (int(ends[first - 1]) if first else 0)
        starts[0] += cut
        lengths[0] -= cut
    return starts, lengths
