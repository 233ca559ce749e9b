"""What a stream is made of: all that decides its rows, and a fingerprint of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from dstrain.data.chat.corpus import ConversationSource, source_of
from dstrain.data.chat.options import RecordOptions
from dstrain.data.listing.hub_names import hub_name
from dstrain.data.listing.sources import Choices, Source, SourceFile, listed
from dstrain.data.rows.order import hash_words
from dstrain.data.streaming.shard_files import HubFiles, LocalFiles, ShardFiles
from dstrain.data.streaming.state import Place
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
_NAMES = {"source", "tokenizer", "records", "config", "split", "revision", "cache", "end"}
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
        end: of a source with a limit, the shard and record in the sorted list that is not read any more.
        cache: the folder of prepared data, for what is known of data sets on the hub; None: no source is one.
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
    end: tuple[int, int] | None = None
    cache: str | None = None
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
        end = tuple(value["end"]) if value.get("end") else None
        records = RecordOptions(**value.get("records", {}))
        return cls(**{**value, "records": records, "held": held, "end": end})


@dataclass(frozen=True)
class Shard:
    """A file, or a row group of one, from 0 on.

    Attributes:
        rows: of the row group.
    """

    file: SourceFile
    group: int | None = None
    rows: int | None = None

    @property
    def name(self) -> str:
        """The same wherever the files lie."""
        return self.file.relative if self.group is None else f"{self.file.relative}#{self.group}"


@dataclass(frozen=True)
class Stream:
    """A stream whose files are listed and whose tokenizer is loaded.

    Attributes:
        shards: sorted by the names of their files; a parquet file that is here is divided into its row groups.
        files: gives the files of shards in any order.
        hub: where the source is a data set there.
        note: told of each file that is read in order, before that.
    """

    request: StreamRequest
    corpus: Source | ConversationSource
    tokenizer: Tokenizer
    shards: tuple[Shard, ...]
    files: ShardFiles = field(default_factory=LocalFiles)
    hub: HubFiles | None = None
    note: Callable[[str], object] = field(default=lambda place: None)

    @classmethod
    def open(
        cls,
        request: StreamRequest,
        passing: Path | None = None,
        note: Callable[[str], object] = lambda place: None,
    ) -> Stream:
        """List the files, and load the tokenizer and the chat template.

        Args:
            passing: a folder for files from the hub while they are read in order; None: they are kept in the cache.
            note: see `Stream`.

        Raises:
            DstrainError: any of these can't be read, or is not as it should be.
        """
        tokenizer = load_tokenizer(request.tokenizer, request.begin)
        records = request.records
        choices = Choices(
            records.data_format, records.data_fields, request.config, request.split, request.revision
        )
        files: ShardFiles = LocalFiles()
        hub = _hub_files(request, passing)
        if hub is None:
            found = listed(request.source, choices)
        else:
            found, files = hub.listing.source(request.source, choices), hub.kept()
        found = replace(found, max_document_bytes=request.max_document_bytes)
        corpus = _corpus_of(found, files, records, tokenizer) if hub else source_of(found, records, tokenizer)
        if isinstance(corpus, TokenRecords | TokenFiles):
            raise DstrainError(
                "tokens are not streamed: there is nothing to tokenize",
                where=corpus.place,
                hint="set data_stream to false; or name texts or conversations",
            )
        shards = map(Shard, corpus.files) if hub else _shards(corpus.files)
        stream = cls(request, corpus, tokenizer, tuple(shards), files, hub, note)
        return stream if request.end is None else stream.until(request.end)

    def until(self, end: tuple[int, int]) -> Stream:
        """The stream of what comes before a shard and record of the sorted list."""
        shards = self.shards[: end[0] + (end[1] > 0)]
        return replace(self, request=replace(self.request, end=end), shards=shards)

    def records_of(self, shard: int) -> int | None:
        """How many records of a shard are read; None: all that it has."""
        end = self.request.end
        return end[1] if end is not None and shard == end[0] else None

    def files_in_order(self, place: Place) -> AbstractContextManager[ShardFiles]:
        """A context with what gives the files in the order of the stream, from a place on."""
        if self.hub is None:
            return nullcontext(self.files)
        return self.hub.in_order(self.request.seed, place.epoch, place.shard, len(self.shards))

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
        if request.end is not None:
            options.append({"end": list(request.end)})
        if self.hub is not None:
            options.append([file.id for file in self.hub.listing.files])
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


def _hub_files(request: StreamRequest, passing: Path | None) -> HubFiles | None:
    name = hub_name(request.source, config=request.config, split=request.split, revision=request.revision)
    if name is None or request.cache is None:
        return None
    return HubFiles.open(name, Path(request.cache), passing)


_Found = Source | ConversationSource | TokenRecords | TokenFiles


def _corpus_of(found: Source, files: ShardFiles, records: RecordOptions, tokenizer: Tokenizer) -> _Found:
    """`source_of` files that are fetched: only those that are needed to tell the format, mostly the first one."""
    if records.data_format != "auto":
        return source_of(found, records, tokenizer)
    here: list[SourceFile] = []
    for file in found.files:
        with files.taken(file) as one:
            here.append(one)
        corpus = source_of(replace(found, files=tuple(here)), records, tokenizer)
        told = corpus.first_text if isinstance(corpus, Source) else getattr(corpus, "first", "")
        if told:
            told = told.replace(one.path, file.path)
            break
    if isinstance(corpus, ConversationSource):
        return replace(corpus, source=found, first=told)
    return replace(corpus, files=found.files, first_text=told) if isinstance(corpus, Source) else corpus


def _shards(files: Sequence[SourceFile]) -> Iterator[Shard]:
    for file in files:
        if file.kind != "parquet":
            yield Shard(file)
            continue
        from dstrain.data.reading.tables import rows_of_groups  # which costs the time to load Arrow

        for group, rows in enumerate(rows_of_groups(file)):
            yield Shard(file, group, rows)


def check_fingerprint(stream: Stream, expected: str) -> None:
    """Raises DstrainError where the stream is another one than was asked for."""
    if stream.fingerprint != expected:
        raise DstrainError(
            f"the files are not those that the stream was made for ({stream.fingerprint} is found, {expected} was)",
            where=stream.corpus.place,
            hint="a stream needs files that stay as they are: start a new run for changed data",
        )
