"""The tokens of blocks: each document between what it begins and ends with, or a conversation with what is trained."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import cast

import numpy as np

from dstrain.data.chat.corpus import ConversationSource, record_batches
from dstrain.data.reading.records import JsonRecord, bad_record
from dstrain.data.streaming.blocks import Block
from dstrain.data.streaming.stream import Stream
from dstrain.data.tokenizing.encoders import EncodedBatch, Piece, RecordEncoder, TextEncoder, batches_of
from dstrain.data.tokenizing.worker_pool import WorkerPool
from dstrain.errors import DstrainError

_Batch = Sequence[Piece] | Sequence[JsonRecord]


@dataclass
class EncodedBlock:
    """A block's tokens, its documents in the order in which they were read.

    Attributes:
        tokens: unsigned integers [n].
        lengths: int64 [documents], none of them 0.
        trained: bool [n], whether a token is to be predicted; None: all are.
        left_out: documents without a token, or records that can't be trained on.
        reasons: the places of these records, and why.
        stop_tokens: the tokens that ended an assistant's turn.
        rendered: whether a chat template was used.
    """

    block: Block
    tokens: np.ndarray
    lengths: np.ndarray
    trained: np.ndarray | None = None
    left_out: int = 0
    reasons: list[str] = field(default_factory=list)
    stop_tokens: set[int] = field(default_factory=set)
    rendered: bool = False


class BlockEncoder:
    """Tokenizes blocks in worker processes, which end with it: used as a context.

    Args:
        workers: how many; 0: in this process. The tokens do not depend on it.
    """

    def __init__(self, stream: Stream, workers: int = 0) -> None:
        self._stream = stream
        work: TextEncoder | RecordEncoder = TextEncoder(stream.tokenizer)
        if isinstance(stream.corpus, ConversationSource):
            work = RecordEncoder(stream.corpus, stream.tokenizer)
        self._pool: WorkerPool[_Batch, EncodedBatch] = WorkerPool(work, workers)  # type: ignore[arg-type]

    def __enter__(self) -> BlockEncoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.close()

    def encode(self, blocks: Iterable[Block]) -> Iterator[EncodedBlock]:
        """Each block's tokens, in their order; no more blocks are taken than are worked on.

        Raises:
            DstrainError: with the place of a record that can't be trained on, or what the blocks raise; those before it
                are given first. Or a worker has ended.
        """
        waiting: deque[tuple[Block, int]] = deque()
        done: list[tuple[_Batch, EncodedBatch]] = []
        for batch, encoded in self._pool.map(self._batches(blocks, waiting)):
            done.append((batch, encoded))
            if len(done) == waiting[0][1]:
                block = waiting.popleft()[0]
                yield (
                    self._texts(block, done) if encoded.trained is None else self._conversations(block, done)
                )
                done = []

    def _batches(self, blocks: Iterable[Block], waiting: deque[tuple[Block, int]]) -> Iterator[_Batch]:
        """What is tokenized at once; notes each block, and into how many batches it was divided."""
        for block in blocks:
            batches: list[_Batch]
            if isinstance(self._stream.corpus, ConversationSource):
                batches = list(record_batches(cast(list[JsonRecord], block.documents)))
            else:
                documents = cast(list[tuple[Piece, ...]], block.documents)
                batches = list(batches_of(piece for document in documents for piece in document))
            waiting.append((block, len(batches)))
            yield from batches

    def _texts(self, block: Block, done: Sequence[tuple[_Batch, EncodedBatch]]) -> EncodedBlock:
        tokenizer = self._stream.tokenizer
        dtype = tokenizer.dtype
        end = np.array([tokenizer.end_of_document], dtype)
        found: list[np.ndarray] = [end[:0]]
        lengths: list[int] = []
        length = empty = 0
        # Of a text that is divided the first part begins as documents do, if it has a token, and the last one ends so.
        begun = block.continues
        reasons: list[str] = []
        for batch, encoded in done:
            reasons += [piece.left_out for piece in cast(Sequence[Piece], batch) if piece.left_out]
            if all(piece.whole for piece in cast(Sequence[Piece], batch)):
                kept = encoded.lengths[encoded.lengths > 0]
                found.append(encoded.tokens)
                lengths += kept.tolist()
                empty += len(batch) - kept.size
                continue
            pieces = np.split(encoded.tokens, np.cumsum(encoded.lengths)[:-1])
            for piece, ids in zip(cast(Sequence[Piece], batch), pieces, strict=True):
                own = [ids]
                if ids.size and not piece.whole and not begun:
                    own.insert(0, np.array(tokenizer.begin_before(ids), dtype))
                begun = begun or ids.size > 0
                if piece.last and begun and not piece.whole:
                    own.append(end)
                found += own
                length += sum(part.size for part in own)
                if piece.last:
                    empty += not begun
                    lengths += [length] * begun
                    length, begun = 0, False
        if length:
            lengths.append(length)
        return EncodedBlock(block, np.concatenate(found), np.array(lengths, np.int64), None, empty, reasons)

    def _conversations(self, block: Block, done: Sequence[tuple[_Batch, EncodedBatch]]) -> EncodedBlock:
        corpus = self._stream.corpus
        assert isinstance(corpus, ConversationSource)
        reasons: list[str] = []
        stops: set[int] = set()
        for batch, encoded in done:
            records = cast(Sequence[JsonRecord], batch)
            for number, record in enumerate(records):
                error = encoded.errors.get(number)
                if error is not None and corpus.options.on_bad_record == "error":
                    raise bad_record(record, error)
                if error is not None:
                    reasons.append(f"{record.where}: {error.message}")
                if (
                    encoded.lengths[number] > self._stream.request.seq_len
                    and corpus.options.too_long == "error"
                ):
                    raise self._too_long(record, int(encoded.lengths[number]))
            stops |= encoded.stop_tokens
        lengths = np.concatenate([encoded.lengths for _, encoded in done])
        trained = [encoded.trained for _, encoded in done if encoded.trained is not None]
        return EncodedBlock(
            block,
            np.concatenate([encoded.tokens for _, encoded in done]),
            lengths[lengths > 0],
            np.concatenate(trained),
            len(reasons),
            reasons,
            stops,
            any(encoded.rendered for _, encoded in done),
        )

    def _too_long(self, record: JsonRecord, tokens: int) -> DstrainError:
        return DstrainError(
            f"this conversation has {tokens:,} tokens, more than seq_len = {self._stream.request.seq_len:,}",
            where=record.where,
            hint=f"set seq_len to {tokens:,} or more; or too_long: drop leaves such out, too_long: cut cuts them",
        )
