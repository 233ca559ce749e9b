"""Writes the tokens of records that hold tokens, into the same files as `dstrain.data.tokenizing.text_writer`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from dstrain.data.chat.formats import TOKENS as FORMAT
from dstrain.data.chat.formats import check_format, rename_fields
from dstrain.data.progress import Progress
from dstrain.data.reading.documents import read_records
from dstrain.data.reading.records import JsonRecord, bad_record
from dstrain.data.token_files.records import TokenDocument, TokenRecords, read_tokens
from dstrain.data.tokenizing.text_writer import Written
from dstrain.data.tokenizing.token_output import MOST_LISTED, TokenOutput, list_skipped
from dstrain.data.tokenizing.tokenizers import Tokenizer
from dstrain.errors import DstrainError

_BLOCK = 2**19
"""Tokens that are written at once."""


def write_token_records(corpus: TokenRecords, tokenizer: Tokenizer, folder: Path) -> Written:
    """Write the tokens of every record into files of ``folder``.

    They are those of `dstrain.data.tokenizing.text_writer.write_tokens`, with ``trained.bin`` where the records have
    labels.

    Raises:
        DstrainError: a record is none of tokens, and bad ones are not skipped; or there is none.
        OSError: the files can't be written.
    """
    left_out = _LeftOut()
    ended = True
    progress = Progress(f"reading {corpus.name}", corpus.bytes, "bytes")
    batches = _batches(corpus, tokenizer.vocab_size, left_out)
    first = next(batches, None)
    if first is None:
        raise left_out.nothing(corpus.place)
    first_record, first_document = first[0][0]
    labelled = first_document.trained is not None
    with TokenOutput(folder, tokenizer.dtype.newbyteorder("<"), bits=labelled) as output:
        for batch, bytes_read in chain([first], batches):
            for record, document in batch:
                if (document.trained is not None) != labelled:
                    words = ("no labels", "some") if labelled else ("labels", "none")
                    raise record.placed(
                        DstrainError(
                            f"this record has {words[0]}, and the one at {first_record.where} has {words[1]}",
                            hint="write labels into all records, or into none",
                        )
                    )
                ended = ended and document.ids[-1] == tokenizer.end_of_document
            documents = [document for _, document in batch]
            bits = [document.trained for document in documents if document.trained is not None]
            output.write(
                np.concatenate([document.ids for document in documents]),
                np.array([document.ids.size for document in documents]),
                np.concatenate(bits) if labelled else None,
            )
            progress.update(bytes_read)
        hashes = output.finish()
    list_skipped(folder, left_out.places)
    # Without labels the content is that of the same documents from texts.
    together = hashlib.blake2b(b"".join(hashes), digest_size=16).hexdigest()
    return Written(
        tokens=output.tokens,
        documents=output.documents,
        empty_documents=left_out.count,
        content=together if labelled else output.hash_together(),
        stop_tokens=(tokenizer.end_of_document,) if ended else (),
    )


class _LeftOut:
    """Records without a token, and bad ones that are skipped."""

    def __init__(self) -> None:
        self.count = 0
        self._reason = ""
        self.places: list[str] = []

    def add(self, record: JsonRecord, reason: str) -> None:
        self.count += 1
        self._reason = self._reason or reason
        if len(self.places) < MOST_LISTED:
            self.places.append(f"{record.where}: {reason}")

    def nothing(self, place: str) -> DstrainError:
        reason = (
            f"all {self.count:,} records were left out: {self._reason}"
            if self.count
            else "it holds no record"
        )
        return DstrainError(f"no tokens in this source: {reason}", hint="name another one", where=place)


_Batch = Sequence[tuple[JsonRecord, TokenDocument]]


def _batches(corpus: TokenRecords, vocab_size: int, left_out: _LeftOut) -> Iterator[tuple[_Batch, int]]:
    """Documents of about `_BLOCK` tokens, and how many bytes of the source were read for them."""
    batch: list[tuple[JsonRecord, TokenDocument]] = []
    size = 0
    for record in read_records(corpus.source, keep_errors=True):
        try:
            if record.error is not None:
                raise record.error
            fields = rename_fields(record.fields, corpus.options.data_fields)
            check_format(fields, FORMAT, corpus.first)
            document = read_tokens(fields, vocab_size)
        except DstrainError as error:
            if corpus.options.on_bad_record == "error":
                raise bad_record(record, error) from None
            left_out.add(record, error.message)
            continue
        if not document.ids.size:
            left_out.add(record, "there are no tokens")
            continue
        batch.append((record, document))
        size += document.ids.size
        if size > _BLOCK:
            yield batch, record.bytes_read
            batch, size = [], 0
    if batch:
        yield batch, batch[-1][0].bytes_read
