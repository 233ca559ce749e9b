"""Writes the tokens of records that hold tokens, into the same files as `dstrain.data.tokenizing.text_writer`."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from dstrain.data.chat.formats import TOKENS as FORMAT
from dstrain.data.chat.formats import check_format, rename_fields
from dstrain.data.progress import Progress
from dstrain.data.reading.documents import read_records
from dstrain.data.reading.records import JsonRecord
from dstrain.data.token_files.records import TokenDocument, TokenRecords, read_tokens
from dstrain.data.tokenizing.text_writer import LENGTHS, SKIPPED, TOKENS, TRAINED, Written
from dstrain.data.tokenizing.tokenizers import Tokenizer
from dstrain.errors import DstrainError

_BLOCK = 2**19
"""Tokens that are written at once."""
_LISTED = 10_000
"""Records that were left out whose place is kept."""


def write_token_records(corpus: TokenRecords, tokenizer: Tokenizer, folder: Path) -> Written:
    """Write the tokens of every record into files of ``folder``.

    They are those of `dstrain.data.tokenizing.text_writer.write_tokens`. Where the records have no labels,
    ``trained.bin`` is left out.

    Raises:
        DstrainError: a record is none of tokens, and bad ones are not skipped; or there is none.
        OSError: the files can't be written.
    """
    dtype = tokenizer.dtype.newbyteorder("<")
    lengths = array("q")
    left_out = _LeftOut()
    ended = True
    digests = [hashlib.blake2b(digest_size=16) for _ in range(2)]
    progress = Progress(f"reading {corpus.name}", corpus.bytes, "bytes")
    rest = np.zeros(0, bool)
    labelled: tuple[bool, str] | None = None
    with open(folder / TOKENS, "wb") as tokens, open(folder / TRAINED, "wb") as trained:
        for batch, bytes_read in _batches(corpus, tokenizer.vocab_size, left_out):
            for record, document in batch:
                has = document.trained is not None
                labelled = labelled or (has, record.where)
                if has != labelled[0]:
                    words = ("labels", "none") if has else ("no labels", "some")
                    raise record.placed(
                        DstrainError(
                            f"this record has {words[0]}, and the one at {labelled[1]} has {words[1]}",
                            hint="write labels into all records, or into none",
                        )
                    )
                ended = ended and document.ids[-1] == tokenizer.end_of_document
                lengths.append(document.ids.size)
            block = np.concatenate([document.ids for _, document in batch]).astype(dtype).tobytes()
            digests[0].update(block)
            tokens.write(block)
            if labelled is not None and labelled[0]:
                bits = np.concatenate(
                    [rest, *(document.trained for _, document in batch if document.trained is not None)]
                )
                whole = bits.size // 8 * 8
                packed, rest = np.packbits(bits[:whole], bitorder="little").tobytes(), bits[whole:]
                digests[1].update(packed)
                trained.write(packed)
            progress.update(bytes_read)
        last = np.packbits(rest, bitorder="little").tobytes()
        digests[1].update(last)
        trained.write(last)
    if labelled is None:
        raise left_out.nothing(corpus.place)
    left_out.write(folder / SKIPPED)
    counts = np.array(lengths, dtype="<i8")
    np.save(folder / LENGTHS, counts, allow_pickle=False)
    if not labelled[0]:  # the content is then that of the same documents from texts
        (folder / TRAINED).unlink()
        digests[0].update(counts.tobytes())
        content = digests[0].hexdigest()
    else:
        of_counts = hashlib.blake2b(counts.tobytes(), digest_size=16)
        together = b"".join(digest.digest() for digest in (*digests, of_counts))
        content = hashlib.blake2b(together, digest_size=16).hexdigest()
    return Written(
        tokens=int(counts.sum()),
        documents=len(lengths),
        empty_documents=left_out.count,
        content=content,
        stop_tokens=(tokenizer.end_of_document,) if ended else (),
    )


class _LeftOut:
    """Records without a token, and bad ones that are skipped."""

    def __init__(self) -> None:
        self.count = 0
        self._reason = ""
        self._places: list[str] = []

    def add(self, record: JsonRecord, reason: str) -> None:
        self.count += 1
        self._reason = self._reason or reason
        if len(self._places) < _LISTED:
            self._places.append(f"{record.where}: {reason}")

    def nothing(self, place: str) -> DstrainError:
        reason = (
            f"all {self.count:,} records were left out: {self._reason}"
            if self.count
            else "it holds no record"
        )
        return DstrainError(f"no tokens in this source: {reason}", hint="name another one", where=place)

    def write(self, path: Path) -> None:
        if self._places:
            listed = "\n".join(self._places)
            path.write_text(f"{listed}\n", encoding="utf-8", errors="backslashreplace")


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
                error.hint = f"{error.hint}; on_bad_record: skip leaves such records out"
                raise record.placed(error) from None
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
