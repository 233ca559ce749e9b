"""Tokenizes a corpus into two files: all tokens, and the length of each document."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dstrain.data.documents import read_documents
from dstrain.data.own_documents import Corpus, OwnSource, read_own_documents
from dstrain.data.progress import Progress
from dstrain.data.tokenizers import Tokenizer
from dstrain.errors import DstrainError

_BATCH = 64  # documents that are in memory and in the tokenizer at once


@dataclass(frozen=True)
class Written:
    """What was written: `tokens` with what documents begin and end with, `content` a hash of tokens and lengths."""

    tokens: int
    documents: int
    empty_documents: int
    content: str


def write_tokens(
    source: Corpus, tokenizer: Tokenizer, tokens_path: Path, lengths_path: Path, scratch: Path
) -> Written:
    """Tokenize every document of `source`, each between the tokens that it begins and ends with.

    Documents without a single token are left out and counted. `tokens_path` becomes raw little-endian
    integers of ``tokenizer.dtype``, `lengths_path` an int64 .npy file with each document's tokens, its begin and
    end included. `scratch` is a folder of our own for the Arrow copy of the text that `datasets` keeps meanwhile
    (about the corpus's size).

    Raises:
        DstrainError: see `read_documents` and `read_own_documents`; or no document holds any text.
        OSError: the files can't be written.
    """
    digest = hashlib.blake2b(digest_size=16)
    dtype = tokenizer.dtype.newbyteorder("<")
    end = np.array([tokenizer.end_of_document], dtype=dtype)
    lengths = array(
        "q"
    )  # not a list, which takes four times the memory for hundreds of millions of documents
    empty = 0
    texts = _load(source, scratch)
    progress = Progress(f"tokenizing {source.name}", len(texts), "documents")
    with open(tokens_path, "wb") as stream:
        for batch in texts.iter(batch_size=_BATCH):
            pieces: list[np.ndarray] = []
            for ids in tokenizer.encode_batch(batch["text"]):
                if ids.size == 0:
                    empty += 1
                    continue
                begin = np.array(tokenizer.begin_before(ids), dtype=dtype)
                pieces += (begin, ids.astype(dtype, copy=False), end)
                lengths.append(begin.size + ids.size + 1)
            if pieces:
                block = np.concatenate(pieces).tobytes()
                digest.update(block)
                stream.write(block)
            progress.update(len(lengths) + empty)
    if not lengths:
        raise DstrainError(
            f"no text in this source: {empty:,} documents, all of them empty",
            where=source.place,
        )
    counts = np.array(lengths, dtype="<i8")
    digest.update(counts.tobytes())
    np.save(lengths_path, counts, allow_pickle=False)
    return Written(int(counts.sum()), len(lengths), empty, digest.hexdigest())


def _load(source: Corpus, scratch: Path) -> Any:
    """The documents as a Hugging Face dataset with the column ``text``.

    The generator is our own reader, not ``load_dataset("text")`` or ``("json")``: those name neither the file
    nor the line of what they can't read, guess a JSON schema, and take a field that is missing here and there
    for null.
    """
    import datasets

    # One column of strings; "large" since Arrow's plain strings end at 2 GiB a batch.
    features = datasets.Features({"text": datasets.Value("large_string")})
    with _no_progress_bars(datasets):
        try:
            return datasets.Dataset.from_generator(
                _examples,
                features=features,
                cache_dir=str(scratch),  # the default would be a folder in the user's home
                gen_kwargs={"source": source},
                writer_batch_size=_BATCH,
            )
        except datasets.exceptions.DatasetGenerationError as error:
            # `datasets` wraps what its generator raises; the user should see our message, not the wrapping.
            cause = error.__cause__
            if isinstance(cause, (DstrainError, OSError)):
                raise cause from None
            raise


def _examples(source: Corpus) -> Iterator[dict[str, str]]:
    progress = Progress(f"reading {source.name}", source.bytes, "bytes")
    found = False
    read = read_own_documents(source) if isinstance(source, OwnSource) else read_documents(source)
    for document in read:
        found = True
        progress.update(document.bytes_read)
        yield {"text": document.text}
    if not found:
        raise DstrainError("no text in this source: all its lines are blank", where=source.place)


@contextmanager
def _no_progress_bars(datasets: Any) -> Iterator[None]:
    """Every rank would draw one. The switch is the library's global, so it is put back."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
