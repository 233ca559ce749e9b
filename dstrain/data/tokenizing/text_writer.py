"""Tokenizes a corpus into files: all tokens, the length of each document, and which tokens are to be predicted."""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dstrain.data.chat.corpus import ConversationSource, record_batches
from dstrain.data.progress import Progress
from dstrain.data.reading.documents import DocumentPart, read_documents, read_records
from dstrain.data.reading.own_documents import OwnSource, TextCorpus, read_own_documents
from dstrain.data.reading.records import JsonRecord, ReadPlace, bad_record
from dstrain.data.tokenizing.encoders import (
    EncodedBatch,
    Piece,
    RecordEncoder,
    TextEncoder,
    batches_of,
    pieces_of,
)
from dstrain.data.tokenizing.token_output import MOST_LISTED, TokenOutput, list_skipped
from dstrain.data.tokenizing.tokenizers import Tokenizer
from dstrain.data.tokenizing.worker_pool import WorkerPool
from dstrain.errors import DstrainError


@dataclass(frozen=True)
class Written:
    """What was written: `tokens` with what documents begin and end with, `content` a hash of tokens and lengths.

    Attributes:
        empty_documents: those without a token, or records that were left out.
        stop_tokens: the tokens that end an assistant's turn.
        rendered: whether a chat template was used.
    """

    tokens: int
    documents: int
    empty_documents: int
    content: str
    stop_tokens: tuple[int, ...] = ()
    rendered: bool = False


def write_tokens(
    corpus: TextCorpus | ConversationSource, tokenizer: Tokenizer, folder: Path, workers: int = 0
) -> Written:
    """Tokenize all documents of `corpus` into files of `folder`.

    ``tokens.bin`` becomes raw little-endian integers of ``tokenizer.dtype``, ``lengths.npy`` an int64 array of each
    document's tokens, its begin and end included. Of conversations ``trained.bin`` becomes a bit for each token, the
    first in the lowest bit of a byte: whether it is to be predicted. Documents without a single token are left out and
    counted. Memory does not grow with the corpus or its documents, as long as a text file has places where it can be
    cut (see `dstrain.data.tokenizing.safe_cuts`).

    Where an earlier call for the same corpus was interrupted in `folder`, this one goes on: see
    `dstrain.data.tokenizing.token_output`. The folder must be of this corpus alone, and nobody else may write there.

    Args:
        workers: processes that tokenize; 0: this one. The files do not depend on it.

    Raises:
        DstrainError: see `read_documents`, `read_records` and `read_own_documents`; with the place of a record that
            can't be trained on, unless those are left out; no document holds any text; or a worker was killed.
        OSError: the files can't be written.
    """
    dtype = tokenizer.dtype.newbyteorder("<")
    with TokenOutput(folder, dtype, bits=isinstance(corpus, ConversationSource)) as output:
        if output.state is not None:
            read = output.state["bytes_read"] / 1e6
            print(
                f"dstrain: tokenizing {corpus.name}: goes on where it was interrupted, at {read:,.1f} MB",
                file=sys.stderr,
            )
        if isinstance(corpus, ConversationSource):
            return _write_conversations(corpus, tokenizer, folder, workers, output)
        return _write_texts(corpus, tokenizer, folder, workers, output)


def _write_texts(
    source: TextCorpus, tokenizer: Tokenizer, folder: Path, workers: int, output: TokenOutput
) -> Written:
    documents = _Documents(tokenizer, output.state)
    pieces = pieces_of(_read(source, documents.place), tokenizer, documents.characters)
    progress = Progress(f"tokenizing {source.name}", source.bytes, "bytes", documents.bytes_read)
    with WorkerPool(TextEncoder(tokenizer), workers) as pool:
        for batch, encoded in pool.map(batches_of(pieces)):
            output.write(*documents.add(batch, encoded), None)
            progress.update(documents.bytes_read)
            if output.is_time_to_save():
                output.save(documents.state())
    output.finish()
    if not output.documents and documents.left_out:
        raise DstrainError(
            f"all {documents.empty:,} records were left out, or are empty; the first: {documents.places[0]}",
            where=source.place,
        )
    if not output.documents:
        raise DstrainError(
            f"no text in this source: {documents.empty:,} documents, all of them empty"
            if documents.empty
            else "no text in this source: it holds no document",
            hint="name one with text",
            where=source.place,
        )
    list_skipped(folder, documents.places)
    return Written(output.tokens, output.documents, documents.empty, output.hash_together())


def _read(source: TextCorpus, place: ReadPlace) -> Iterator[DocumentPart]:
    if not isinstance(source, OwnSource):
        yield from read_documents(source, place)
        return
    for number, part in enumerate(read_own_documents(source)):
        if number >= place.number:
            yield DocumentPart(part.text, part.bytes_read, number=number)


class _Documents:
    """Puts documents that were cut together again, and knows how far it has come.

    Args:
        state: as `state` gave it; None: from the beginning.

    Attributes:
        place: where to go on reading.
        characters: of the document there that are done.
        empty: how many documents had no token, or were left out.
        left_out, places: records without a text: how many, and which.
        bytes_read: of the source.
    """

    def __init__(self, tokenizer: Tokenizer, state: Any) -> None:
        begin = {"place": asdict(ReadPlace()), "characters": 0, "length": 0, "empty": 0, "bytes_read": 0}
        state = {**begin, "left_out": 0, "places": [], **(state or {})}
        self._tokenizer = tokenizer
        self._end = np.array([tokenizer.end_of_document], dtype=tokenizer.dtype)
        self._length = int(state["length"])  # tokens so far of the document that is cut
        self.place = ReadPlace(**state["place"])
        self.characters = int(state["characters"])
        self.empty = int(state["empty"])
        self.left_out = int(state["left_out"])
        self.places = list(state["places"])
        self.bytes_read = int(state["bytes_read"])

    def state(self) -> dict[str, Any]:
        return {
            "place": asdict(self.place),
            "characters": self.characters,
            "length": self._length,
            "empty": self.empty,
            "left_out": self.left_out,
            "places": self.places,
            "bytes_read": self.bytes_read,
        }

    def add(self, batch: Sequence[Piece], encoded: EncodedBatch) -> tuple[np.ndarray, np.ndarray]:
        """The next tokens of the file, and the lengths of the documents that end with them."""
        last = batch[-1]
        ended = sum(piece.last for piece in batch)
        self.place = ReadPlace(last.file, last.number + last.last, self.place.read + ended)
        self.bytes_read = last.bytes_read
        reasons = [piece.left_out for piece in batch if piece.left_out]
        self.left_out += len(reasons)
        self.places += reasons[: MOST_LISTED - len(self.places)]
        if all(piece.whole for piece in batch):
            kept = encoded.lengths[encoded.lengths > 0]
            self.empty += len(batch) - kept.size
            return encoded.tokens, kept
        block: list[np.ndarray] = []
        lengths = array("q")
        for piece, ids in zip(batch, np.split(encoded.tokens, np.cumsum(encoded.lengths)[:-1]), strict=True):
            block += self._joined(piece, ids, lengths)
            self.characters = 0 if piece.last else self.characters + len(piece.text)
        return np.concatenate(block), np.array(lengths, dtype=np.int64)

    def _joined(self, piece: Piece, ids: np.ndarray, lengths: array[int]) -> Iterator[np.ndarray]:
        if ids.size and self._length == 0 and not piece.whole:
            begin = np.array(self._tokenizer.begin_before(ids), dtype=ids.dtype)
            yield begin
            self._length = begin.size
        yield ids
        self._length += ids.size
        if not piece.last:
            return
        if self._length and not piece.whole:
            yield self._end
            self._length += 1
        if self._length:
            lengths.append(self._length)
        else:
            self.empty += 1
        self._length = 0


def _write_conversations(
    corpus: ConversationSource, tokenizer: Tokenizer, folder: Path, workers: int, output: TokenOutput
) -> Written:
    found = _Conversations(corpus, output.state)
    batches = record_batches(read_records(corpus.source, keep_errors=True, start=found.place))
    progress = Progress(f"tokenizing {corpus.name}", corpus.bytes, "bytes", found.bytes_read)
    with WorkerPool(RecordEncoder(corpus, tokenizer), workers) as pool:
        for batch, encoded in pool.map(batches):
            found.add(batch, encoded)
            output.write(encoded.tokens, encoded.lengths[encoded.lengths > 0], encoded.trained)
            progress.update(found.bytes_read)
            if output.is_time_to_save():
                output.save(found.state())
    # Each file has its own hash: what is written at once is no part of the content.
    together = b"".join(output.finish())
    if not output.documents:
        raise DstrainError(
            f"all {found.skipped:,} records were left out: {found.first_skipped}"
            if found.skipped
            else "no records in this source: all its lines are blank",
            where=corpus.place,
        )
    list_skipped(folder, found.places)
    return Written(
        tokens=output.tokens,
        documents=output.documents,
        empty_documents=found.skipped,
        content=hashlib.blake2b(together, digest_size=16).hexdigest(),
        stop_tokens=tuple(sorted(found.stops)),
        rendered=found.rendered > 0,
    )


class _Conversations:
    """Counts records, and knows how far it has come.

    Args:
        state: as `state` gave it; None: from the beginning.

    Attributes:
        place: where to go on reading.
        bytes_read: of the source.
        skipped, first_skipped, places: records that are left out: how many, why the first one, and which.
        stops: the tokens that end turns.
        rendered: how many went through the template.
    """

    def __init__(self, corpus: ConversationSource, state: Any) -> None:
        state = state or {}
        self._corpus = corpus
        self.place = ReadPlace(**state.get("place", {}))
        self.bytes_read = int(state.get("bytes_read", 0))
        self.skipped = int(state.get("skipped", 0))
        self.first_skipped = str(state.get("first_skipped", ""))
        self.places = list(state.get("places", []))
        self.stops = set(state.get("stops", []))
        self.rendered = int(state.get("rendered", 0))

    def state(self) -> dict[str, Any]:
        return {
            "place": asdict(self.place),
            "bytes_read": self.bytes_read,
            "skipped": self.skipped,
            "first_skipped": self.first_skipped,
            "places": self.places,
            "stops": sorted(self.stops),
            "rendered": self.rendered,
        }

    def add(self, batch: Sequence[JsonRecord], encoded: EncodedBatch) -> None:
        """Count what was found of a batch. Raises the first error of its records where none may be left out."""
        for number, error in sorted(encoded.errors.items()):
            if self._corpus.options.on_bad_record == "error":
                raise bad_record(batch[number], error)
            self.first_skipped = self.first_skipped or error.message
            if len(self.places) < MOST_LISTED:
                self.places.append(f"{batch[number].where}: {error.message}")
        last = batch[-1]
        self.place = ReadPlace(last.file, last.number + 1, self.place.read + len(batch))
        self.bytes_read = last.bytes_read
        self.skipped += len(encoded.errors)
        self.rendered += encoded.rendered
        self.stops |= encoded.stop_tokens
