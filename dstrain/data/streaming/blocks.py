"""Reads a stream's shards in the order of each epoch, and gathers their documents into blocks.

A block holds what is shuffled together. Where it ends depends on the documents' number and characters, and not on their
tokens, so that whoever reads needs no tokenizer's work, and blocks can be tokenized in any order.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np

from dstrain.data.chat.corpus import ConversationSource, characters
from dstrain.data.listing.sources import Source, SourceFile
from dstrain.data.reading.documents import documents_of, errors_of, records_of
from dstrain.data.reading.records import JsonRecord
from dstrain.data.streaming.shard_files import ShardFiles
from dstrain.data.streaming.shard_order import order_of_shards
from dstrain.data.streaming.state import Place
from dstrain.data.streaming.stream import Shard, Stream
from dstrain.data.tokenizing.encoders import Piece, pieces_of
from dstrain.errors import DstrainError

_OVERHEAD = 64
"""Characters that a document counts for besides its own."""

Document = tuple[Piece, ...] | JsonRecord
"""A text, or a part of a long one, in pieces; or a record with a conversation."""


@dataclass
class Block:
    """Documents that are shuffled together.

    Attributes:
        place: where it begins.
        after: where the next one does.
        continues: its one document is a part of a text whose beginning came before.
        unfinished: its one document goes on in the next block.
    """

    place: Place
    after: Place
    documents: list[Document] = field(default_factory=list)
    continues: bool = False
    unfinished: bool = False


def shard_order(stream: Stream, epoch: int) -> np.ndarray:
    """The shards' numbers in the order of an epoch: int64 [shards]."""
    return order_of_shards(stream.request.seed, epoch, len(stream.shards))


def read_blocks(stream: Stream, place: Place) -> Iterator[Block]:
    """The blocks from a place on, without an end.

    Raises:
        DstrainError: a file can't be read or fetched, holds what is no text or no record, or has changed since it was
            listed; or there is no document to train on.
    """
    with stream.files_in_order(place) as files:
        while True:
            found = False
            for block in _read_epoch(stream, place, files):
                found = True
                yield block
            if not found and place == Place(place.epoch):
                raise DstrainError(
                    "no document is left to train on"
                    if stream.request.held
                    else "no document in this source: all its lines are blank",
                    where=stream.corpus.place,
                    hint="add more text, or set validation to 0" if stream.request.held else "add some text",
                )
            place = Place(place.epoch + 1)


def _read_epoch(stream: Stream, place: Place, files: ShardFiles) -> Iterator[Block]:
    request = stream.request
    block = Block(place, place)
    size = 0

    def ended(after: Place) -> Block:
        """The block as it is, and begin the next one behind it."""
        nonlocal block, size
        done, size = block, 0
        done.after = after if after.epoch > place.epoch else replace(after, block=done.place.block + 1)
        block = Block(done.after, done.after)
        return done

    for position, shard in enumerate(shard_order(stream, place.epoch)):
        if position < place.shard:
            continue
        first = (place.record, place.part) if position == place.shard else (0, 0)
        stream.note(stream.shards[int(shard)].file.path)
        for one in read_shard(stream, int(shard), first[0], files):
            if (one.record, one.part) < first or is_held(stream, int(shard), one.record):
                continue
            here = Place(place.epoch, position, one.record, one.part)
            behind = replace(here, record=one.record + 1, part=0)
            if one.part or not one.last:
                if block.documents:
                    yield ended(here)
                block.documents = [one.document]
                block.continues, block.unfinished = one.part > 0, not one.last
                yield ended(behind if one.last else replace(here, part=one.part + 1))
                continue
            block.documents.append(one.document)
            size += one.size
            if len(block.documents) == request.window or size >= request.characters:
                yield ended(behind)
    if block.documents:
        yield ended(Place(place.epoch + 1))


@dataclass(frozen=True)
class ReadDocument:
    """A document of a shard, or a part of one of more than ``characters``.

    Attributes:
        record: how many records of the shard came before.
        part: how many parts of this one came before.
        last: whether it ends with this part.
        size: what it counts for in a block.
        bytes_read: of the file, to get this far.
    """

    record: int
    part: int
    last: bool
    document: Document
    size: int
    bytes_read: int


def is_held(stream: Stream, shard: int, record: int) -> bool:
    """Whether a record is for validation."""
    held = stream.request.held
    return held is not None and held.holds(stream.shards[shard].name, shard, record)


def read_shard(
    stream: Stream, shard: int, record: int = 0, files: ShardFiles | None = None
) -> Iterator[ReadDocument]:
    """The documents of a shard from a record on. The file is looked at before and behind it.

    Args:
        files: gives its file; None: the stream's own, in any order.

    Raises:
        DstrainError: see `read_blocks`.
    """
    known, end = stream.shards[shard], stream.records_of(shard)
    with (files or stream.files).taken(known.file) as file, _places_of(known.file, file):
        place = replace(known, file=file)
        _check_unchanged(file)
        if isinstance(stream.corpus, ConversationSource):
            found = _records(stream.corpus.source, place, record)
        else:
            found = _texts(stream, stream.corpus, place, record)
        for one in found:
            if one.record == end:
                break
            yield one if file is known.file else _placed(one, file.path, known.file.path)
        _check_unchanged(file)


@contextmanager
def _places_of(known: SourceFile, here: SourceFile) -> Iterator[None]:
    """Errors name a file as it is known, and not where it lies for a while."""
    try:
        yield
    except DstrainError as error:
        error.message = error.message.replace(here.path, known.path)
        error.where = error.where and error.where.replace(here.path, known.path)
        raise


def _placed(document: ReadDocument, here: str, known: str) -> ReadDocument:
    if not isinstance(document.document, JsonRecord):
        pieces = document.document
        if any(piece.left_out for piece in pieces):
            pieces = tuple(piece._replace(left_out=piece.left_out.replace(here, known)) for piece in pieces)
        return replace(document, document=pieces)
    record = replace(document.document, where=document.document.where.replace(here, known))
    if record.error is not None and record.error.where is not None:
        record.error.where = record.error.where.replace(here, known)
    return replace(document, document=record)


def _records(source: Source, shard: Shard, first: int) -> Iterator[ReadDocument]:
    with errors_of(shard.file):
        records = records_of(shard.file, source, skip=first, group=shard.group)
        for number, record in enumerate(records, start=first):
            size = _OVERHEAD + characters(record.fields)
            yield ReadDocument(number, 0, True, record, size, record.bytes_read)


def _texts(stream: Stream, source: Source, shard: Shard, first: int) -> Iterator[ReadDocument]:
    pieces: list[Piece] = []
    record, part, size = first, 0, 0
    parts = documents_of(shard.file, source, skip=first, group=shard.group)
    for piece in pieces_of(parts, stream.tokenizer):
        pieces.append(piece)
        size += len(piece.text)
        if piece.last or size >= stream.request.characters:
            size += _OVERHEAD
            yield ReadDocument(record, part, piece.last, tuple(pieces), size, piece.bytes_read)
            record, part = (record + 1, 0) if piece.last else (record, part + 1)
            pieces, size = [], 0


def _check_unchanged(file: SourceFile) -> None:
    try:
        status = os.stat(file.path)
        changed = (status.st_size, status.st_mtime_ns) != (file.size, file.mtime_ns)
        reason = "this file has changed while it was streamed"
    except OSError as error:
        changed, reason = True, f"this file can't be read any more: {error.strerror}"
    if changed:
        raise DstrainError(
            reason,
            where=file.path,
            hint="a stream needs files that stay as they are: start a new run for changed data",
        )
