"""Prepares a corpus for training: tokenized once, split, and packed into rows.

On the command line: ``python -m dstrain.data.prepare REQUEST.json OUT.json`` reads the arguments of `prepare`
from a JSON object and writes the summary. For the documents of code, the object has a key ``own``, of the other
attributes of `OwnSource`, and an error is written in place of the summary.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dstrain.child_process import child_main
from dstrain.data.chat.corpus import ConversationSource, Corpus, listed_source, source_of
from dstrain.data.chat.options import RecordOptions
from dstrain.data.dataset_summary_cache import keep_summary, summary_file, tokenizer_state
from dstrain.data.listing.sources import Source, find_files
from dstrain.data.reading.own_documents import OwnSource, answer
from dstrain.data.rows.packing import PackedRows, Rows, SeparateRows, TokenStream
from dstrain.data.rows.split import fraction_for, split_stream
from dstrain.data.rows.whole_documents import WholeDocumentRows, fit
from dstrain.data.token_cache import Tokens, load_or_build
from dstrain.data.token_files.corpus import TokenFiles
from dstrain.data.token_files.records import TokenRecords
from dstrain.data.tokenizing.tokenizers import Tokenizer, load_tokenizer
from dstrain.errors import DstrainError
from dstrain.files import write_json

_HASHED = 2**20
"""Numbers that are hashed at once: there may be one for each of 10^8 documents."""
_OPTIONAL = {
    *("own", "max_document_bytes", "records", "limit", "workers", "config", "split", "revision", "use"),
}
_REQUEST: dict[str, type | tuple[type, ...]] = {
    "source": str,
    "tokenizer": str,
    "seq_len": int,
    "validation": (int, float),
    "cache_dir": str,
    "pack": bool,
    "begin": str,
}


@dataclass(frozen=True)
class PackedData:
    """The rows to train on, and those to evaluate on (None without a validation set).

    `fingerprint` is a hash of the tokens, the sequence length, the split and whether rows are packed, not of file
    names or times: hosts with equal fingerprints hold the same rows under the same numbers. `folder` is that of the
    token cache in which they lie. `lengths` are the tokens of each document, int64 [documents].
    """

    train: Rows
    validation: Rows | None
    tokenizer: Tokenizer
    fingerprint: str
    source: Corpus
    documents: int
    validation_documents: int
    empty_documents: int
    tokens: int
    folder: Path
    lengths: np.ndarray
    trained_tokens: int | None = None
    cut_documents: int = 0
    dropped_documents: int = 0
    stop_tokens: tuple[int, ...] = ()
    rendered: bool = False

    def summary(self) -> dict[str, Any]:
        """What `dstrain` tells of the data, as JSON values. Tokens count what documents begin and end with; `padding`
        is the share of tokens in the rows to train on that only fill them up.
        """
        return {
            "source": self.source.name,
            "files": len(self.source.files),
            "bytes": self.source.bytes,
            "documents": self.documents,
            "validation_documents": self.validation_documents,
            "empty_documents": self.empty_documents,
            "tokens": self.tokens,
            "seq_len": self.train.seq_len,
            "train_rows": len(self.train),
            "validation_rows": len(self.validation) if self.validation is not None else 0,
            "padding": self.train.padding,
            "tokenizer": self.tokenizer.name,
            "tokenizer_fingerprint": self.tokenizer.fingerprint,
            "vocab_size": self.tokenizer.vocab_size,
            "fingerprint": self.fingerprint,
            "documents_hash": self.source.content if isinstance(self.source, OwnSource) else "",
            "begins_with": self.tokenizer.begins_with,
            "ends_with": self.tokenizer.ends_with,
            **self._of_conversations(),
        }

    def _of_conversations(self) -> dict[str, Any]:
        if isinstance(self.source, TokenRecords | TokenFiles):
            return self._of_tokens(self.source.format)
        if not isinstance(self.source, ConversationSource):
            if isinstance(self.source, Source) and self.source.text_field != "text":
                return {"text_field": self.source.text_field}
            return {}
        return {
            "begins_with": "",
            "ends_with": " ".join(self.tokenizer.token_text([token]) for token in self.stop_tokens),
            "format": self.source.format,
            "chat_template": self.source.template.source if self.rendered else "",
            "stop_tokens": list(self.stop_tokens),
            "trained_tokens": self.trained_tokens,
            "cut_documents": self.cut_documents,
            "dropped_documents": self.dropped_documents,
            "train_on": self.source.options.train_on,
            "train_stop_token": self.source.options.train_stop_token,
        }

    def _of_tokens(self, format_name: str) -> dict[str, Any]:
        """Documents that were tokenized elsewhere begin and end as they do."""
        return {
            "begins_with": "",
            "ends_with": " ".join(self.tokenizer.token_text([token]) for token in self.stop_tokens),
            "format": format_name,
            "trained_tokens": self.trained_tokens,
            "cut_documents": self.cut_documents,
            "dropped_documents": self.dropped_documents,
        }


def prepare(
    source: str | OwnSource,
    tokenizer: str,
    seq_len: int,
    validation: float | int,
    cache_dir: Path | str,
    pack: bool = True,
    max_document_bytes: int | None = None,
    begin: str = "auto",
    records: RecordOptions | None = None,
    limit: int | None = None,
    config: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    workers: int | None = None,
    use: Literal["training", "validation"] = "training",
) -> PackedData:
    """Tokenize `source` into `cache_dir` unless that was done before, split it, and put it into rows.

    Safe to call from any number of processes and hosts at once; an incomplete cache is rebuilt.
    Tokens are cached for any `seq_len`, `validation` and `pack`.

    Args:
        source: see `dstrain.data.listing.sources`; or the documents that code gives, which is called where no tokens
            of them are in the cache.
        tokenizer: see `dstrain.data.tokenizing.tokenizers`.
        seq_len: tokens a row, at least 1.
        validation: the share of the documents to keep from training, at least 0 (none) and less than 1.
        cache_dir: made if it is not there.
        max_document_bytes: None: as `dstrain.data.reading.documents` has it.
        pack: fill each row with as many documents as it takes, else with one and padding.
        begin: what documents begin with: see `dstrain.data.tokenizing.tokenizers.load_tokenizer`.
        records: the format of records, and what of conversations is trained.
        limit: how many documents to read of files; None: all.
        config, split, revision: which part of a data set that has several.
        workers: see `dstrain.data.token_cache.load_or_build`.
        use: what the rows are for, in messages.

    Raises:
        DstrainError: any of these is not as it should be, or there are fewer tokens than one row takes.
    """
    if seq_len < 1:
        raise DstrainError(f"seq_len is {seq_len}, but must be at least 1")
    if not 0 <= validation < 1:
        raise DstrainError(
            f"validation is {validation}, but must be a fraction of the documents: at least 0 (none), less than 1",
            hint="0.01 holds back about one document in a hundred",
        )
    tokens_of = load_tokenizer(tokenizer, begin)
    files: Corpus
    if isinstance(source, OwnSource):
        files = source
    else:
        records = records or RecordOptions()
        found = find_files(
            source,
            data_format=records.data_format,
            data_fields=records.data_fields,
            config=config,
            split=split,
            revision=revision,
            cache=Path(cache_dir).expanduser(),
        )
        found = replace(found, max_document_bytes=max_document_bytes, limit=limit)
        files = source_of(found, records, tokens_of)
    tokens = load_or_build(files, tokens_of, Path(cache_dir).expanduser(), workers)
    if isinstance(files, ConversationSource | TokenRecords) and tokens.stream.trained is not None:
        return _conversations(files, tokens, tokens_of, seq_len, validation, pack)
    train, held = split_stream(tokens.stream, validation)
    if pack:
        _check_rows(tokens, train, held, seq_len, validation, files, use)
    else:
        _check_labels(train, held, files, use)

    def rows(stream: TokenStream) -> Rows:
        if pack:
            return PackedRows(stream, seq_len)
        return SeparateRows(stream, seq_len, tokens_of.end_of_document)

    return PackedData(
        train=rows(train),
        validation=rows(held) if held is not None else None,
        tokenizer=tokens_of,
        fingerprint=_fingerprint(tokens, train, seq_len, pack),
        source=files,
        documents=int(tokens.stream.lengths.size),
        validation_documents=int(held.lengths.size) if held is not None else 0,
        empty_documents=tokens.empty_documents,
        tokens=tokens.stream.size,
        folder=tokens.folder,
        lengths=tokens.stream.lengths,
        stop_tokens=tokens.stop_tokens,
    )


def _conversations(
    source: ConversationSource | TokenRecords,
    tokens: Tokens,
    tokenizer: Tokenizer,
    seq_len: int,
    validation: float,
    pack: bool,
) -> PackedData:
    """The rows of what is trained in parts, none of which is cut where that was not said."""
    stream, too_long = tokens.stream, source.options.too_long
    each = "document" if isinstance(source, TokenRecords) else "conversation"
    longer = int((stream.lengths > seq_len).sum())
    if longer and too_long == "error":
        raise DstrainError(
            f"{longer:,} of {stream.lengths.size:,} {each}s have more than seq_len = {seq_len:,} tokens, up to"
            f" {stream.lengths.max():,}",
            where=source.place,
            hint=f"set seq_len to {stream.lengths.max():,}; or too_long: drop leaves them out, too_long: cut cuts them",
        )
    fitted = fit(stream, seq_len, too_long)
    if not fitted.stream.lengths.size:
        raise DstrainError(
            f"no {each} has a part to train on in its first {seq_len:,} tokens",
            where=source.place,
            hint=f"set seq_len to {stream.lengths.max():,}",
        )
    train, held = split_stream(fitted.stream, validation)
    if held is not None and fitted.stream.lengths.size == 1:
        raise DstrainError(
            f"a single {each} can't be divided into training and validation",
            where=source.place,
            hint="add more, or set validation to 0",
        )

    def rows(part: TokenStream) -> WholeDocumentRows:
        return WholeDocumentRows(part, seq_len, tokenizer.end_of_document, pack=pack)

    parts = [rows(part) for part in (train, held) if part is not None]
    return PackedData(
        train=parts[0],
        validation=parts[1] if held is not None else None,
        tokenizer=tokenizer,
        fingerprint=_fingerprint(tokens, train, seq_len, pack),
        source=source,
        documents=int(stream.lengths.size),
        validation_documents=int(held.lengths.size) if held is not None else 0,
        empty_documents=tokens.empty_documents,
        tokens=fitted.stream.size,
        folder=tokens.folder,
        lengths=stream.lengths,
        trained_tokens=sum(int(part.label_tokens(np.arange(len(part))).sum()) for part in parts),
        cut_documents=fitted.cut,
        dropped_documents=fitted.dropped,
        stop_tokens=tokens.stop_tokens,
        rendered=tokens.rendered,
    )


def _fingerprint(tokens: Tokens, train: TokenStream, seq_len: int, pack: bool) -> str:
    digest = hashlib.sha256(f"{tokens.content} {seq_len}{'' if pack else ' separate'}".encode())
    for numbers in (train.starts, train.lengths):
        for at in range(0, numbers.size, _HASHED):
            digest.update(numbers[at : at + _HASHED].astype("<i8").tobytes())
    return digest.hexdigest()[:32]


def _check_rows(
    tokens: Tokens,
    train: TokenStream,
    held: TokenStream | None,
    seq_len: int,
    validation: float,
    files: Corpus,
    use: str,
) -> None:
    listed = listed_source(files)
    limit = listed.limit if isinstance(listed, Source) else None
    if train.size < seq_len and use == "validation":
        raise DstrainError(
            f"this validation set has {train.size:,} tokens, but one row needs {seq_len:,}",
            hint="raise limit, or add text to this validation set"
            if limit is not None
            else "add text to this validation set",
            where=files.place,
        )
    if train.size < seq_len:
        raised = "raise limit, " if limit is not None else ""
        total = f"{tokens.stream.size:,} tokens"
        found = f"{total} ({train.size:,} of them to train on)" if held is not None else total
        raise DstrainError(
            f"this source has {found}, but one row needs {seq_len:,}",
            hint=f"set seq_len to {train.size:,} or less, {raised}or add more text",
            where=files.place,
        )
    if held is not None and held.size < seq_len:
        fraction = fraction_for(tokens.stream, seq_len)
        more = f"set validation to {fraction:g}, " if fraction is not None else ""
        raise DstrainError(
            f"validation: {validation:g} holds back {held.size:,} tokens ({held.lengths.size:,} documents), "
            f"less than one row of {seq_len:,}",
            hint=f"{more}set validation to 0 (none), or set seq_len to {held.size:,} or less",
            where=files.place,
        )


def _check_labels(train: TokenStream, held: TokenStream | None, files: Corpus, use: str) -> None:
    """Separate rows may be short, but one must have something to predict."""
    whole = "to train on" if use == "training" else "of this validation set"
    for what, stream in ((whole, train), ("for validation", held)):
        if stream is not None and stream.lengths.max() < 2:
            raise DstrainError(
                f"no document {what} has two tokens, so there is nothing to predict",
                hint="add more text, or change validation"
                if use == "training"
                else "add text to this validation set",
                where=files.place,
            )


@child_main
def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    if len(argv) != 2:
        print("usage: python -m dstrain.data.prepare REQUEST.json OUT.json", file=sys.stderr)
        return 2
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    request, out = _request(Path(argv[0])), Path(argv[1])
    if "own" in request:  # the user's code may want the network
        return answer(out, lambda: _prepare_and_keep(request))
    # Nothing else needs the network, and a library that asks for it should fail rather than hang.
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    summary = _prepare_and_keep(request)
    try:
        write_json(out, summary)
    except OSError as error:
        raise DstrainError(
            f"the summary can't be written: {error.strerror or error}", where=str(out)
        ) from error
    return 0


def prepare_as_asked(request: dict[str, Any]) -> PackedData:
    """`prepare` with arguments that are JSON values."""
    asked = {**request, "records": RecordOptions(**request.get("records", {}))}
    if "own" in asked:
        asked["source"] = OwnSource(asked["source"], **asked.pop("own"))
    return prepare(**asked)


def _prepare_and_keep(request: dict[str, Any]) -> dict[str, Any]:
    """`prepare`, and the summary, which is kept for others."""
    state = tokenizer_state(request["tokenizer"])  # before it is read
    # Before the template's file is read.
    known = RecordOptions(**request["records"]).state if "records" in request else ()
    data = prepare_as_asked(request)
    choices = {key: request[key] for key in ("seq_len", "validation", "pack", "begin")}
    source = listed_source(data.source)
    if isinstance(source, Source):
        # Which field holds a text is found out, and the rest stands with the records.
        source = replace(source, text_field="text", on_bad_record="error")
    cache = Path(request["cache_dir"]).expanduser()
    kept = summary_file(cache, source, state, **choices, records=known)
    summary = data.summary()
    keep_summary(kept, data.folder, summary)
    return summary


def _request(path: Path) -> dict[str, Any]:
    """The arguments of `prepare` from a JSON file."""
    try:
        request = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DstrainError(
            f"the request can't be read: {error.strerror or error}", where=str(path)
        ) from error
    except ValueError as error:
        raise DstrainError(f"the request is not JSON: {error}", where=str(path)) from error
    if not isinstance(request, dict) or set(request) - _OPTIONAL != set(_REQUEST):
        raise DstrainError(
            f"the request is not an object with exactly {', '.join(_REQUEST)}", where=str(path)
        )
    for key, kinds in _REQUEST.items():
        if not isinstance(request[key], kinds) or (isinstance(request[key], bool) and kinds is not bool):
            raise DstrainError(f"{key!r} is {request[key]!r}, which has the wrong type", where=str(path))
    for key in ("max_document_bytes", "limit", "workers"):
        number = request.get(key)
        if number is not None and (not isinstance(number, int) or isinstance(number, bool)):
            raise DstrainError(f"{key!r} is {number!r}, which has the wrong type", where=str(path))
    return request


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
