"""What a stream is made of: all that decides its rows, and a fingerprint of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from dstrain.data.chat.corpus import ConversationSource, source_of
from dstrain.data.chat.options import RecordOptions
from dstrain.data.listing.sources import Source, SourceFile, find_files
from dstrain.data.rows.order import hash_words
from dstrain.data.token_files.corpus import TokenFiles
from dstrain.data.token_files.records import TokenRecords
from dstrain.data.tokenizing.tokenizers import Tokenizer, load_tokenizer
from dstrain.errors import DstrainError
from dstrain.strict_json import to_json

FORMAT = 1
WINDOW = 8192
"""Documents that are shuffled together."""
CHARACTERS = 2**23
"""A block of documents ends with this many, so that its memory is bounded whatever its documents are."""
_NAMES = {"source", "tokenizer", "records", "config", "split", "revision"}
"""What shows in the files that they lead to."""
_SALT = 0x76616C69646174  # "validat": what is held back must not share its hash with anything else


@dataclass(frozen=True)
class Held:
    """Which records are for validation: of those up to a limit, in the sorted list of shards, a share by their hash.

    Attributes:
        fraction: the share.
        shard, record: the first record that is not looked at any more, by the shard's number in the sorted list.
    """

    fraction: float
    shard: int
    record: int

    def holds(self, name: str, shard: int, record: int) -> bool:
        """Whether the record is for validation; `name` is that of its shard."""
        return (shard, record) < (self.shard, self.record) and is_chosen(name, record, self.fraction)


def is_chosen(name: str, record: int, fraction: float) -> bool:
    """Whether a record's hash lies in the share ``fraction``."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return hash_words(_SALT, int.from_bytes(digest, "little"), record) < fraction * 2**64


@dataclass(frozen=True)
class StreamRequest:
    """A stream by the names of its things, as a process is asked for it.

    Attributes:
        source: what `dstrain.data.listing.sources.find_files` takes.
        tokenizer, begin: what `dstrain.data.tokenizing.tokenizers.load_tokenizer` takes.
        records: the format of records, and what of conversations is trained.
        config, split, revision: which part of a data set that has several.
        window: documents that are shuffled together.
        characters: what ends a block before.
    """

    source: str
    tokenizer: str
    seq_len: int
    seed: int
    begin: str = "auto"
    pack: bool = True
    max_document_bytes: int | None = None
    records: RecordOptions = field(default_factory=RecordOptions)
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    held: Held | None = None
    window: int = WINDOW
    characters: int = CHARACTERS

    def __post_init__(self) -> None:
        if min(self.seq_len, self.window, self.characters) < 1:
            raise ValueError("seq_len, window and characters must be at least 1")

    def to_json(self) -> dict[str, Any]:
        """As an object of JSON."""
        records = {
            **asdict(replace(self.records, data_fields={})),
            "data_fields": dict(self.records.data_fields),
        }
        return {**asdict(replace(self, records=RecordOptions())), "records": records}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> StreamRequest:
        """The reverse of `to_json`; what is missing has its default."""
        held = Held(**value["held"]) if value.get("held") else None
        return cls(**{**value, "records": RecordOptions(**value.get("records", {})), "held": held})


@dataclass(frozen=True)
class Shard:
    """A file, or a row group of one, from 0 on."""

    file: SourceFile
    group: int | None = None

    @property
    def name(self) -> str:
        """The same wherever the files lie."""
        return self.file.relative if self.group is None else f"{self.file.relative}#{self.group}"


@dataclass(frozen=True)
class Stream:
    """A stream whose files are listed and whose tokenizer is loaded.

    Attributes:
        shards: sorted by the names of their files; a parquet file is divided into its row groups.
    """

    request: StreamRequest
    corpus: Source | ConversationSource
    tokenizer: Tokenizer
    shards: tuple[Shard, ...]

    @classmethod
    def open(cls, request: StreamRequest) -> Stream:
        """List the files, and load the tokenizer and the chat template.

        Raises:
            DstrainError: any of these can't be read, or is not as it should be.
        """
        tokenizer = load_tokenizer(request.tokenizer, request.begin)
        records = request.records
        found = find_files(
            request.source,
            data_format=records.data_format,
            data_fields=records.data_fields,
            config=request.config,
            split=request.split,
            revision=request.revision,
        )
        found = replace(found, max_document_bytes=request.max_document_bytes)
        corpus = source_of(found, records, tokenizer)
        if isinstance(corpus, TokenRecords | TokenFiles):
            raise DstrainError(
                "tokens are not streamed: there is nothing to tokenize",
                where=corpus.place,
                hint="set data_stream to false; or name texts or conversations",
            )
        return cls(request, corpus, tokenizer, tuple(_shards(corpus.files)))

    @property
    def fingerprint(self) -> str:
        """A hash of all that decides the rows, as far as shows without reading: names and sizes of the files, the
        tokenizer, the format and template, and the options. Where files lie and when they were written is no part."""
        request, corpus = self.request, self.corpus
        asked = request.to_json()
        options: list[Any] = [asked[name] for name in sorted(set(asked) - _NAMES)]
        if isinstance(corpus, ConversationSource):
            fields = sorted(request.records.data_fields.items())
            options += [corpus.format, fields, corpus.template.fingerprint]
            options += [request.records.on_bad_record, request.records.too_long]
        elif corpus.text_field != "text":
            options.append(corpus.text_field)
        content = to_json(
            [
                FORMAT,
                [(file.relative, file.kind, file.size) for file in corpus.files],
                self.tokenizer.fingerprint,
                list(self.tokenizer.begin_of_document),
                *options,
            ]
        )
        return hashlib.sha256(content.encode()).hexdigest()[:32]


def _shards(files: Sequence[SourceFile]) -> Iterator[Shard]:
    for file in files:
        if file.kind != "parquet":
            yield Shard(file)
            continue
        from dstrain.data.reading.tables import row_groups  # which costs the time to load Arrow

        for group in range(row_groups(file)):
            yield Shard(file, group)


def check_fingerprint(stream: Stream, expected: str) -> None:
    """Raises DstrainError where the stream is another one than was asked for."""
    if stream.fingerprint != expected:
        raise DstrainError(
            f"the files are not those that the stream was made for ({stream.fingerprint} is found, {expected} was)",
            where=stream.corpus.place,
            hint="a stream needs files that stay as they are: start a new run for changed data",
        )
