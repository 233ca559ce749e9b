"""The tokens of a block: each document between what it begins and ends with, or a conversation with what is trained."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from dstrain.data.chat.corpus import ConversationSource, bad_record, encode_records
from dstrain.data.chat.template import Encoded
from dstrain.data.documents import JsonRecord
from dstrain.data.streaming.blocks import Block
from dstrain.data.streaming.state import Place
from dstrain.data.streaming.stream import Stream
from dstrain.data.token_writer import Piece, batches_of
from dstrain.errors import DstrainError


@dataclass(frozen=True)
class EncodedBlock:
    """A block's tokens, its documents in the order in which they were read.

    Attributes:
        place, after, continues, unfinished: as of a `Block`.
        tokens: unsigned integers [n].
        lengths: int64 [documents], none of them 0.
        trained: bool [n], whether a token is to be predicted; None: all are.
        left_out: documents without a token, or records that can't be trained on, with the place and reason of these.
    """

    place: Place
    after: Place
    tokens: np.ndarray
    lengths: np.ndarray
    trained: np.ndarray | None
    continues: bool
    unfinished: bool
    left_out: int
    reasons: tuple[str, ...]


class Encoder(Protocol):
    """Tokenizes blocks, and keeps their order."""

    def encode(self, blocks: Iterable[Block]) -> Iterator[EncodedBlock]:
        """Each block's tokens; no more blocks are taken than can be worked on.

        Raises:
            DstrainError: with the place of a record that can't be trained on; what was taken before it is given first.
        """


class EncoderHere:
    """Tokenizes in this process, block by block."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def encode(self, blocks: Iterable[Block]) -> Iterator[EncodedBlock]:
        for block in blocks:
            yield encode_block(self._stream, block)


def encode_block(stream: Stream, block: Block) -> EncodedBlock:
    """The tokens of one block.

    Raises:
        DstrainError: with the place of a record that can't be trained on.
    """
    if isinstance(stream.corpus, ConversationSource):
        return _conversations(stream, stream.corpus, block)
    return _texts(stream, block)


def _texts(stream: Stream, block: Block) -> EncodedBlock:
    tokenizer = stream.tokenizer
    dtype = tokenizer.dtype
    end = np.array([tokenizer.end_of_document], dtype)
    found: list[np.ndarray] = []
    lengths: list[int] = []
    length = 0
    # Of a long text it is the first part that begins as documents do, if it has a token, and the last one that ends so.
    begun = block.continues
    empty = 0
    pieces = [piece for document in block.documents for piece in _pieces(document)]
    for batch in batches_of(pieces):
        encoded = tokenizer.encode_batch([piece.text for piece in batch], [piece.after for piece in batch])
        for piece, ids in zip(batch, encoded, strict=True):
            if ids.size and not begun:
                begin = np.array(tokenizer.begin_before(ids), dtype)
                found.append(begin)
                length, begun = begin.size, True
            found.append(ids.astype(dtype, copy=False))
            length += ids.size
            if piece.last:
                if begun:
                    found.append(end)
                    length += 1
                    lengths.append(length)
                else:
                    empty += 1
                length, begun = 0, False
    if length:
        lengths.append(length)
    tokens = np.concatenate([*found, np.zeros(0, dtype)])
    return _encoded(block, tokens, lengths, None, empty)


def _pieces(document: Sequence[Piece] | JsonRecord) -> Sequence[Piece]:
    assert not isinstance(document, JsonRecord)
    return document


def _conversations(stream: Stream, corpus: ConversationSource, block: Block) -> EncodedBlock:
    records = [one for one in block.documents if isinstance(one, JsonRecord)]
    kept: list[Encoded] = []
    reasons: list[str] = []
    for record, one in zip(records, encode_records(corpus, records), strict=True):
        if isinstance(one, Encoded):
            if one.ids.size > stream.request.seq_len and corpus.options.too_long == "error":
                raise _too_long(stream, record, one.ids.size)
            kept.append(one)
        elif corpus.options.on_bad_record == "error":
            raise bad_record(record, one)
        else:
            reasons.append(f"{record.where}: {one.message}")
    tokens = np.concatenate([*(one.ids for one in kept), np.zeros(0, stream.tokenizer.dtype)])
    trained = np.concatenate([*(one.trained for one in kept), np.zeros(0, bool)])
    lengths = [one.ids.size for one in kept]
    return _encoded(block, tokens, lengths, trained, len(reasons), reasons)


def _too_long(stream: Stream, record: JsonRecord, tokens: int) -> DstrainError:
    return DstrainError(
        f"this conversation has {tokens:,} tokens, more than seq_len = {stream.request.seq_len:,}",
        where=record.where,
        hint=f"set seq_len to {tokens:,} or more; or too_long: drop leaves such out, too_long: cut cuts them",
    )


def _encoded(
    block: Block,
    tokens: np.ndarray,
    lengths: Sequence[int],
    trained: np.ndarray | None,
    left_out: int,
    reasons: Sequence[str] = (),
) -> EncodedBlock:
    return EncodedBlock(
        block.place,
        block.after,
        tokens,
        np.array(lengths, np.int64),
        trained,
        block.continues,
        block.unfinished,
        left_out,
        tuple(reasons),
    )


def say_left_out(block: EncodedBlock) -> None:
    """Name the records that were left out, in the log."""
    for reason in block.reasons:
        print(f"left out: {reason}", file=sys.stderr)
