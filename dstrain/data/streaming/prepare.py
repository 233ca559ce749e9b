"""What a plan says of a stream, and what the ranks make of it before they train.

On the command line: ``python -m dstrain.data.streaming.prepare REQUEST.json ANSWER.json``. The request has ``stream``,
as of `StreamRequest.to_json`, and ``validation``, ``samples`` and ``limit`` as of `summarise`; the answer is what that
returns.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dstrain.child_process import child_main
from dstrain.data.chat.corpus import ConversationSource
from dstrain.data.rows.packing import Rows
from dstrain.data.streaming.blocks import Block, read_shard
from dstrain.data.streaming.encoding import BlockEncoder
from dstrain.data.streaming.limits import end_of_first
from dstrain.data.streaming.rows import StreamRows
from dstrain.data.streaming.shard_files import go_offline
from dstrain.data.streaming.state import Place
from dstrain.data.streaming.stream import Stream, StreamRequest
from dstrain.data.streaming.validation import hold_back, rows_of_blocks
from dstrain.data.tokenizing.tokenizers import Tokenizer
from dstrain.errors import DstrainError
from dstrain.files import write_json

_LOOKED_AT = 2**20
"""Characters at the beginning that the rest is estimated from."""


@dataclass(frozen=True)
class StreamedData:
    """A source that is streamed.

    Attributes:
        train: its rows, to be opened.
        validation: those that are held back; None without.
    """

    train: StreamRows
    validation: Rows | None
    tokenizer: Tokenizer


def prepare_stream(
    request: StreamRequest, samples: int, fingerprint: str, where: str, hint: str
) -> StreamedData:
    """Look whether the files are those of the plan, and read what is held back.

    Args:
        samples: of the validation set.
        fingerprint: that of the plan.
        where, hint: of an error that they are others.

    Raises:
        DstrainError: they are, or can't be read.
    """
    stream = Stream.open(request)
    found = stream.fingerprint
    if found != fingerprint:
        raise DstrainError(
            f"the data is not what the plan was made for ({found} is found, {fingerprint} in the plan)",
            where=where,
            hint=hint,
        )
    held, rows = request.held, None
    if held is not None:
        without = replace(stream, request=replace(request, held=None))
        back = hold_back(without, held.fraction, samples)
        if back.held != held:
            raise DstrainError(
                "the documents for validation are not those of the plan", where=where, hint=hint
            )
        rows = back.rows
    return StreamedData(StreamRows(request, fingerprint), rows, stream.tokenizer)


def summarise(
    request: StreamRequest, validation: float, samples: int, limit: int | None = None
) -> dict[str, Any]:
    """What is said of a stream, as JSON values: those of `dstrain.data.prepare.PackedData.summary`, of which numbers of
    documents, tokens and rows are estimates from the first documents; and ``held_until`` and ``limit_until``, each a
    shard and a record: those of `Held`, and the ``end`` of `StreamRequest`.

    Args:
        validation: the share of documents that is held back; 0: none.
        samples: how many rows they shall fill.
        limit: how many documents are read, from the first of the sorted list of shards; None: all.

    Raises:
        DstrainError: the files can't be read, their first documents can't be trained on, or fill no row.
    """
    stream = Stream.open(request)
    size = stream.corpus.bytes
    if limit is not None:
        end, size = end_of_first(stream, limit)
        stream = stream.until(end)
    held_rows, held_documents = 0, 0
    stops: set[int] = set()
    if validation:
        back = hold_back(stream, validation, samples)
        held_rows, held_documents = len(back.rows), back.documents
        stops |= set(back.stop_tokens)
        stream = replace(stream, request=replace(stream.request, held=back.held))
    look = _look(stream, size)
    stops |= look.stop_tokens
    tokenizer, held = stream.tokenizer, stream.request.held
    summary = {
        "source": stream.corpus.name,
        "files": len(stream.corpus.files),
        "bytes": stream.corpus.bytes,
        "documents": look.of_all(look.documents)
        if limit is None
        else min(limit, look.of_all(look.documents)),
        "validation_documents": held_documents,
        "empty_documents": 0,
        "tokens": look.of_all(look.tokens),
        "seq_len": request.seq_len,
        "train_rows": max(1, look.of_all(look.tokens / request.seq_len / (1 - look.padding))),
        "validation_rows": held_rows,
        "padding": look.padding,
        "tokenizer": tokenizer.name,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "fingerprint": stream.fingerprint,
        "documents_hash": "",
        "begins_with": tokenizer.begins_with,
        "ends_with": tokenizer.ends_with,
        "streamed": True,
        "held_until": [held.shard, held.record] if held else None,
        "limit_until": stream.request.end,
    }
    if isinstance(stream.corpus, ConversationSource):
        summary |= {
            "begins_with": "",
            "ends_with": " ".join(tokenizer.token_text([token]) for token in sorted(stops)),
            "format": stream.corpus.format,
            "chat_template": stream.corpus.template.source if look.rendered else "",
            "stop_tokens": sorted(stops),
            "trained_tokens": look.of_all(look.labels),
            "train_on": stream.corpus.options.train_on,
            "train_stop_token": stream.corpus.options.train_stop_token,
        }
    elif stream.corpus.text_field != "text":
        summary["text_field"] = stream.corpus.text_field
    return summary


@dataclass(frozen=True)
class _Look:
    """What the first documents hold.

    Attributes:
        share: how much of the source they are, by its bytes.
        padding: of the rows that they fill.
    """

    documents: int
    tokens: int
    labels: int
    padding: float
    share: float
    stop_tokens: set[int]
    rendered: bool

    def of_all(self, number: float) -> int:
        """What the whole source would have, if it went on like this."""
        return round(number / self.share)


def _look(stream: Stream, size: int) -> _Look:
    reads = _Reads()
    with BlockEncoder(stream) as encoder:
        blocks = list(encoder.encode(reads.of(stream)))
    rows = rows_of_blocks(stream, blocks)
    tokens = sum(encoded.tokens.size for encoded in blocks)
    if not len(rows) and reads.all:
        raise DstrainError(
            f"this source has {tokens:,} tokens to train on, but one row needs {stream.request.seq_len:,}",
            where=stream.corpus.place,
            hint="add more text, or set a smaller seq_len",
        )
    labels = int(rows.label_tokens(np.arange(len(rows))).sum())
    return _Look(
        sum(encoded.lengths.size for encoded in blocks),
        tokens,
        labels,
        rows.padding if len(rows) else 0.0,
        1.0 if reads.all else min(1.0, reads.bytes / size),
        {token for encoded in blocks for token in encoded.stop_tokens},
        any(encoded.rendered for encoded in blocks),
    )


class _Reads:
    """Reads the first documents.

    Attributes:
        bytes: that were read.
        all: whether that is all there are.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self.all = False

    def of(self, stream: Stream) -> Iterator[Block]:
        """Each document as a block by itself."""
        size = before = 0
        held, file = stream.request.held, stream.shards[0].file
        for number, shard in enumerate(stream.shards):
            if shard.file != file:
                before, file = before + file.size, shard.file
            for one in read_shard(stream, number):
                self.bytes = max(1, before + one.bytes_read)
                if held is None or not held.holds(shard.name, number, one.record):
                    yield Block(Place(), Place(), [one.document], one.part > 0, not one.last)
                    size += one.size
                if size >= _LOOKED_AT:
                    return
        self.all = True


@child_main
def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    go_offline()
    asked: Mapping[str, Any] = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
    request = StreamRequest.from_json(asked["stream"])
    write_json(Path(argv[1]), summarise(request, asked["validation"], asked["samples"], asked["limit"]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
