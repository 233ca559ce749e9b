"""Tokenizes a corpus into files: all tokens, the length of each document, and which tokens are to be predicted."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dstrain.data.chat.corpus import ConversationSource, bad_record, record_batches
from dstrain.data.documents import read_documents, read_records
from dstrain.data.encoders import EncodedBatch, Piece, RecordEncoder, TextEncoder, batches_of, pieces_of
from dstrain.data.own_documents import OwnSource, TextCorpus, read_own_documents
from dstrain.data.progress import Progress
from dstrain.data.tokenizers import Tokenizer
from dstrain.data.worker_pool import WorkerPool
from dstrain.errors import DstrainError

TOKENS, LENGTHS, TRAINED, SKIPPED = "tokens.bin", "lengths.npy", "trained.bin", "skipped.txt"
_LISTED = 10_000
"""Records that were left out whose place is kept."""


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
    cut (see `dstrain.data.safe_cuts`).

    Args:
        workers: processes that tokenize; 0: this one. The files do not depend on it.

    Raises:
        DstrainError: see `read_documents`, `read_records` and `read_own_documents`; with the place of a record that
            can't be trained on, unless those are left out; no document holds any text; or a worker was killed.
        OSError: the files can't be written.
    """
    if isinstance(corpus, ConversationSource):
        return _write_conversations(corpus, tokenizer, folder, workers)
    return _write_texts(corpus, tokenizer, folder, workers)


def _write_texts(source: TextCorpus, tokenizer: Tokenizer, folder: Path, workers: int) -> Written:
    digest = hashlib.blake2b(digest_size=16)
    documents = _Documents(tokenizer)
    read = read_own_documents(source) if isinstance(source, OwnSource) else read_documents(source)
    progress = Progress(f"tokenizing {source.name}", source.bytes, "bytes")
    with open(folder / TOKENS, "wb") as stream, WorkerPool(TextEncoder(tokenizer), workers) as pool:
        for batch, encoded in pool.map(batches_of(pieces_of(read, tokenizer))):
            content = documents.add(batch, encoded)
            digest.update(content)
            stream.write(content)
            progress.update(batch[-1].bytes_read)
    empty = documents.empty
    if not documents.lengths:
        raise DstrainError(
            f"no text in this source: {empty:,} documents, all of them empty"
            if empty
            else "no text in this source: it holds no document",
            where=source.place,
        )
    counts = np.array(documents.lengths, dtype="<i8")
    digest.update(counts.tobytes())
    np.save(folder / LENGTHS, counts, allow_pickle=False)
    return Written(int(counts.sum()), counts.size, empty, digest.hexdigest())


class _Documents:
    """Puts documents that were cut together again, and counts.

    Attributes:
        lengths: of the documents so far. No list, which takes four times the memory for hundreds of millions of them.
        empty: how many had no token.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._dtype = tokenizer.dtype.newbyteorder("<")
        self._end = np.array([tokenizer.end_of_document], dtype=self._dtype)
        self._length = 0
        self.lengths = array("q")
        self.empty = 0

    def add(self, batch: Sequence[Piece], encoded: EncodedBatch) -> bytes:
        """The next tokens of the file."""
        if all(piece.whole for piece in batch):
            kept = encoded.lengths[encoded.lengths > 0]
            self.lengths.frombytes(kept.tobytes())
            self.empty += len(batch) - kept.size
            return encoded.tokens.astype(self._dtype, copy=False).tobytes()
        ends = np.cumsum(encoded.lengths)
        block: list[np.ndarray] = []
        for piece, ids in zip(batch, np.split(encoded.tokens, ends[:-1]), strict=True):
            block += self._joined(piece, ids)
        return np.concatenate(block).astype(self._dtype, copy=False).tobytes()

    def _joined(self, piece: Piece, ids: np.ndarray) -> Iterator[np.ndarray]:
        if ids.size and self._length == 0 and not piece.whole:
            begin = np.array(self._tokenizer.begin_before(ids), dtype=self._dtype)
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
            self.lengths.append(self._length)
        else:
            self.empty += 1
        self._length = 0


def _write_conversations(
    corpus: ConversationSource, tokenizer: Tokenizer, folder: Path, workers: int
) -> Written:
    # Each file has its own: what is written at once is no part of the content.
    digests = [hashlib.blake2b(digest_size=16) for _ in range(3)]
    dtype = tokenizer.dtype.newbyteorder("<")
    lengths = array("q")
    skipped, rendered, first_skipped = 0, 0, ""
    stops: set[int] = set()
    places: list[str] = []
    progress = Progress(f"tokenizing {corpus.name}", corpus.bytes, "bytes")
    rest = np.zeros(0, bool)
    batches = record_batches(read_records(corpus.source, keep_errors=True))
    with (
        open(folder / TOKENS, "wb") as tokens,
        open(folder / TRAINED, "wb") as trained,
        WorkerPool(RecordEncoder(corpus, tokenizer), workers) as pool,
    ):
        for batch, encoded in pool.map(batches):
            assert encoded.trained is not None
            for number, error in sorted(encoded.errors.items()):
                if corpus.options.on_bad_record == "error":
                    raise bad_record(batch[number], error)
                first_skipped = first_skipped or error.message
                if len(places) < _LISTED:
                    places.append(f"{batch[number].where}: {error.message}")
            skipped += len(encoded.errors)
            rendered += encoded.rendered
            stops |= encoded.stop_tokens
            block = encoded.tokens.astype(dtype, copy=False).tobytes()
            bits = np.concatenate([rest, encoded.trained])
            whole = bits.size // 8 * 8
            packed = np.packbits(bits[:whole], bitorder="little").tobytes()
            rest = bits[whole:]
            for digest, stream, content in zip(digests, (tokens, trained), (block, packed), strict=False):
                digest.update(content)
                stream.write(content)
            lengths.frombytes(encoded.lengths[encoded.lengths > 0].tobytes())
            progress.update(batch[-1].bytes_read)
        last = np.packbits(rest, bitorder="little").tobytes()
        digests[1].update(last)
        trained.write(last)
    if not lengths:
        raise DstrainError(
            f"all {skipped:,} records were left out: {first_skipped}"
            if skipped
            else "no records in this source: all its lines are blank",
            where=corpus.place,
        )
    if places:
        listed = "\n".join(places)
        (folder / SKIPPED).write_text(f"{listed}\n", encoding="utf-8", errors="backslashreplace")
    counts = np.array(lengths, dtype="<i8")
    digests[2].update(counts.tobytes())
    together = b"".join(digest.digest() for digest in digests)
    np.save(folder / LENGTHS, counts, allow_pickle=False)
    return Written(
        tokens=int(counts.sum()),
        documents=len(lengths),
        empty_documents=skipped,
        content=hashlib.blake2b(together, digest_size=16).hexdigest(),
        stop_tokens=tuple(sorted(stops)),
        rendered=rendered > 0,
    )
