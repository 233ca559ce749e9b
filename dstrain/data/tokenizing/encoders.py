"""What turns a batch of texts or records into tokens, here or in a worker (`dstrain.data.tokenizing.worker_pool`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from dstrain.data.chat.corpus import ConversationSource, encode_records
from dstrain.data.chat.template import Encoded
from dstrain.data.reading.documents import DocumentPart
from dstrain.data.reading.records import JsonRecord
from dstrain.data.tokenizing.safe_cuts import CONTEXT
from dstrain.data.tokenizing.tokenizers import Tokenizer
from dstrain.errors import DstrainError

_PIECE = 2**18
"""Characters of a long document from which on a place to cut it is looked for."""
_OVERHEAD = 64
"""What a document of any length counts for, so that a batch of short ones ends too."""
_BATCH = 2**19
"""Characters that are tokenized at once, of many documents or of one: a tokenizer takes 100 to 200 bytes for each."""


class Piece(NamedTuple):
    """A document or a piece of a long one.

    Attributes:
        after: the character in front of it, where it is not the first one of its document, else "".
        last: whether the document ends with it.
        bytes_read: of the source.
        file, number, left_out: as of a `DocumentPart`.
    """

    after: str
    text: str
    last: bool
    bytes_read: int
    file: int = 0
    number: int = 0
    left_out: str = ""

    @property
    def whole(self) -> bool:
        """Whether it is all of its document."""
        return self.last and not self.after


@dataclass(frozen=True)
class EncodedBatch:
    """The tokens of a batch, one item behind the other.

    Attributes:
        tokens: the tokenizer's `dtype` [n].
        lengths: how many of them each item has, int64 [items]; 0: one without a token, or with an error.
        trained: bool [n], whether a token is to be predicted; None: each one is.
        errors: why an item can't be trained on, by its number in the batch. Its place is not in it.
        stop_tokens: the tokens that ended an assistant's turn.
        rendered: how many items went through a chat template.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    trained: np.ndarray | None = None
    errors: dict[int, DstrainError] = field(default_factory=dict)
    stop_tokens: frozenset[int] = frozenset()
    rendered: int = 0


class TextEncoder:
    """Encodes pieces of documents: a whole one with what documents begin and end with, of one that is cut each piece
    without."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __call__(self, batch: Sequence[Piece]) -> EncodedBatch:
        tokenizer = self._tokenizer
        encoded = tokenizer.encode_batch([piece.text for piece in batch], [piece.after for piece in batch])
        begin = np.array(tokenizer.begin_of_document, dtype=tokenizer.dtype)
        end = np.array([tokenizer.end_of_document], dtype=tokenizer.dtype)
        parts: list[np.ndarray] = [begin[:0]]
        lengths = np.zeros(len(batch), dtype=np.int64)
        for number, (piece, ids) in enumerate(zip(batch, encoded, strict=True)):
            if not ids.size:
                continue
            own = [ids]
            if piece.whole:
                own = [begin, ids, end] if tokenizer.begin_before(ids) else [ids, end]
            parts += own
            lengths[number] = sum(part.size for part in own)
        return EncodedBatch(np.concatenate(parts), lengths)


class RecordEncoder:
    """Encodes the records of a corpus of conversations."""

    def __init__(self, corpus: ConversationSource, tokenizer: Tokenizer) -> None:
        self._corpus = corpus
        self._dtype = tokenizer.dtype

    def __call__(self, batch: Sequence[JsonRecord]) -> EncodedBatch:
        template = self._corpus.template
        template.stop_tokens, template.conversations = set(), 0
        found = encode_records(self._corpus, batch)
        good = [one for one in found if isinstance(one, Encoded)]
        return EncodedBatch(
            tokens=np.concatenate([np.zeros(0, self._dtype), *(one.ids for one in good)]),
            lengths=np.array([one.ids.size if isinstance(one, Encoded) else 0 for one in found], np.int64),
            trained=np.concatenate([np.zeros(0, bool), *(one.trained for one in good)]),
            errors={number: one for number, one in enumerate(found) if isinstance(one, DstrainError)},
            stop_tokens=frozenset(template.stop_tokens),
            rendered=template.conversations,
        )


def pieces_of(parts: Iterable[DocumentPart], tokenizer: Tokenizer, characters: int = 0) -> Iterator[Piece]:
    """The documents, long ones cut where that changes no token.

    Args:
        characters: of the first document that were given by an earlier call.
    """
    text = after = ""
    start = searched = 0
    for part in parts:
        new = part.text
        if characters >= len(new) > 0:
            after, characters = new[-1], characters - len(new)
            continue
        if characters:
            after, new, characters = new[characters - 1], new[characters:], 0
        text, searched, start = text[start:] + new, searched - start, 0
        while len(text) - start > 2 * _PIECE:
            cut = tokenizer.safe_cut(text, max(start + _PIECE, searched))
            if cut is None:
                searched = len(text) - CONTEXT
                break
            yield Piece(after, text[start:cut], False, part.bytes_read, part.file, part.number)
            after, start = text[cut - 1], cut
        if part.last:
            yield Piece(after, text[start:], True, part.bytes_read, part.file, part.number, part.left_out)
            text, after = "", ""
            start = searched = 0


def batches_of(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """The pieces in batches that are tokenized at once."""
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        if batch and size + len(piece.text) > _BATCH:
            yield batch
            batch, size = [], 0
        batch.append(piece)
        size += len(piece.text) + _OVERHEAD
    if batch:
        yield batch
