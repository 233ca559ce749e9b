"""Tokenizes a corpus into two files: all tokens, and the length of each document."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dstrain.data.documents import DocumentPart, read_documents
from dstrain.data.own_documents import OwnSource, TextCorpus, read_own_documents
from dstrain.data.progress import Progress
from dstrain.data.safe_cuts import CONTEXT
from dstrain.data.tokenizers import Tokenizer
from dstrain.errors import DstrainError

_PIECE = 2**16
"""Characters of a long document that are tokenized at once."""
_OVERHEAD = 64
"""What a document of any length counts for, so that a batch of short ones ends too."""
_BATCH = 2**19
"""Characters that are tokenized at once, of many documents or of one: a tokenizer takes 100 to 200 bytes for each."""


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


@dataclass(frozen=True)
class _Piece:
    """A document or a piece of a long one.

    Attributes:
        after: the character in front of it, where it is not the first one of its document, else "".
        last: whether the document ends with it.
        bytes_read: of the source.
    """

    after: str
    text: str
    last: bool
    bytes_read: int


def write_tokens(source: TextCorpus, tokenizer: Tokenizer, tokens_path: Path, lengths_path: Path) -> Written:
    """Tokenize every document of `source`, each between the tokens that it begins and ends with.

    Documents without a single token are left out and counted. `tokens_path` becomes raw little-endian
    integers of ``tokenizer.dtype``, `lengths_path` an int64 .npy file with each document's tokens, its begin and
    end included. Memory does not grow with the corpus or its documents, as long as a text file has places where it can
    be cut (see `dstrain.data.safe_cuts`).

    Raises:
        DstrainError: see `read_documents` and `read_own_documents`; or no document holds any text.
        OSError: the files can't be written.
    """
    digest = hashlib.blake2b(digest_size=16)
    dtype = tokenizer.dtype.newbyteorder("<")
    end = np.array([tokenizer.end_of_document], dtype=dtype)
    # Not a list, which takes four times the memory for hundreds of millions of documents.
    lengths = array("q")
    empty = length = 0
    read = read_own_documents(source) if isinstance(source, OwnSource) else read_documents(source)
    progress = Progress(f"tokenizing {source.name}", source.bytes, "bytes")
    with open(tokens_path, "wb") as stream:
        for batch in _batches(_pieces(read, tokenizer)):
            block: list[np.ndarray] = []
            encoded = tokenizer.encode_batch(
                [piece.text for piece in batch], [piece.after for piece in batch]
            )
            for piece, ids in zip(batch, encoded, strict=True):
                if ids.size and length == 0:
                    begin = np.array(tokenizer.begin_before(ids), dtype=dtype)
                    block.append(begin)
                    length = begin.size
                block.append(ids.astype(dtype, copy=False))
                length += ids.size
                if piece.last and length:
                    block.append(end)
                    lengths.append(length + 1)
                    length = 0
                elif piece.last:
                    empty += 1
            content = np.concatenate(block).tobytes()
            digest.update(content)
            stream.write(content)
            progress.update(batch[-1].bytes_read)
    if not lengths:
        raise DstrainError(
            f"no text in this source: {empty:,} documents, all of them empty"
            if empty
            else "no text in this source: it holds no document",
            where=source.place,
        )
    counts = np.array(lengths, dtype="<i8")
    digest.update(counts.tobytes())
    np.save(lengths_path, counts, allow_pickle=False)
    return Written(int(counts.sum()), len(lengths), empty, digest.hexdigest())


def _pieces(parts: Iterable[DocumentPart], tokenizer: Tokenizer) -> Iterator[_Piece]:
    """The documents, long ones cut where that changes no token."""
    text = after = ""
    start = searched = 0
    for part in parts:
        text, searched, start = text[start:] + part.text, searched - start, 0
        while len(text) - start > 2 * _PIECE:
            cut = tokenizer.safe_cut(text, max(start + _PIECE, searched))
            if cut is None:
                searched = len(text) - CONTEXT
                break
            yield _Piece(after, text[start:cut], False, part.bytes_read)
            after, start = text[cut - 1], cut
        if part.last:
            yield _Piece(after, text[start:], True, part.bytes_read)
            text, after = "", ""
            start = searched = 0


def _batches(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    batch: list[_Piece] = []
    size = 0
    for piece in pieces:
        if batch and size + len(piece.text) > _BATCH:
            yield batch
            batch, size = [], 0
        batch.append(piece)
        size += len(piece.text) + _OVERHEAD
    if batch:
        yield batch
