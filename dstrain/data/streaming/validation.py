"""The validation samples of a stream: documents chosen by a hash, from the beginning of the sorted shards on.

A share of all documents would need all of them to be read before training. So only as many are chosen as the samples
take, and all others are trained on; which ones is known by the share and the place up to which they were chosen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dstrain.data.chat.corpus import ConversationSource
from dstrain.data.rows.packing import PackedRows, Rows, SeparateRows, TokenStream
from dstrain.data.rows.whole_documents import WholeDocumentRows, fit
from dstrain.data.streaming.blocks import Block, read_shard
from dstrain.data.streaming.encoding import BlockEncoder, EncodedBlock
from dstrain.data.streaming.state import Place
from dstrain.data.streaming.stream import Held, Stream, is_chosen
from dstrain.errors import DstrainError


@dataclass(frozen=True)
class HeldBack:
    """What is for validation.

    Attributes:
        documents: how many were chosen.
        stop_tokens: what ends an assistant's turn in them.
    """

    held: Held
    rows: Rows
    documents: int
    stop_tokens: tuple[int, ...] = ()


def hold_back(stream: Stream, fraction: float, samples: int) -> HeldBack:
    """Choose documents until they fill so many rows, or there are no more.

    Args:
        stream: one without documents that are held back.
        fraction: the share of the documents that is chosen of those that are read; above 0 and below 1.

    Raises:
        DstrainError: see `read_blocks` and `BlockEncoder.encode`; or those that are chosen don't fill a row.
    """
    blocks: list[EncodedBlock] = []
    end = (len(stream.shards), 0)
    tokens = rows = documents = 0
    with BlockEncoder(stream) as encoder:
        for encoded in encoder.encode(_chosen(stream, fraction)):
            blocks.append(encoded)
            documents += not encoded.block.continues
            tokens += encoded.tokens.size
            if _keeps_documents_apart(stream):
                rows += int(-(-(encoded.lengths - 1) // stream.request.seq_len).sum())
            else:
                rows = tokens // stream.request.seq_len
            if rows >= samples:
                end = (encoded.block.place.shard, encoded.block.place.record + 1)
                break
    found = rows_of_blocks(stream, blocks)
    if not len(found):
        raise DstrainError(
            f"validation: {fraction:g} chooses {documents:,} documents with {tokens:,} tokens, which fill no row of"
            f" {stream.request.seq_len:,}",
            where=stream.corpus.place,
            hint="set validation to a larger fraction, or to 0 (none)",
        )
    stops = tuple(sorted({token for encoded in blocks for token in encoded.stop_tokens}))
    return HeldBack(Held(fraction, *end), found, documents, stops)


def _keeps_documents_apart(stream: Stream) -> bool:
    return not stream.request.pack and not isinstance(stream.corpus, ConversationSource)


def _chosen(stream: Stream, fraction: float) -> Iterator[Block]:
    """The chosen documents in their order, each a block by itself, or several where it is divided. The shard of its
    place is the number in the sorted list."""
    for number, shard in enumerate(stream.shards):
        for one in read_shard(stream, number):
            if is_chosen(shard.name, one.record, fraction):
                place = Place(0, number, one.record, one.part)
                yield Block(place, place, [one.document], one.part > 0, not one.last)


def rows_of_blocks(stream: Stream, blocks: Sequence[EncodedBlock]) -> Rows:
    """The rows that these documents fill, in their order."""
    request = stream.request
    lengths: list[int] = []
    is_open = False
    for block in blocks:
        found = block.lengths.tolist()
        if is_open and found:
            lengths[-1] += found.pop()
        lengths += found
        is_open = block.block.unfinished and (is_open or block.lengths.size > 0)
    sizes = np.array(lengths, np.int64)
    tokens = np.concatenate([*(block.tokens for block in blocks), np.zeros(0, stream.tokenizer.dtype)])
    starts = np.cumsum(sizes) - sizes
    end = stream.tokenizer.end_of_document
    if not isinstance(stream.corpus, ConversationSource):
        text = TokenStream(tokens, starts, sizes)
        return PackedRows(text, request.seq_len) if request.pack else SeparateRows(text, request.seq_len, end)
    trained = np.concatenate(
        [*(block.trained for block in blocks if block.trained is not None), np.zeros(0, bool)]
    )
    documents = TokenStream(tokens, starts, sizes, np.packbits(trained, bitorder="little"))
    fitted = fit(documents, request.seq_len, stream.corpus.options.too_long)
    return WholeDocumentRows(fitted.stream, request.seq_len, end, pack=request.pack)
