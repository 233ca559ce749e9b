"""A corpus of conversations: which format and chat template it has, and its tokens with what is trained of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dstrain.data.chat.formats import (
    FIELDS,
    PROMPT_COMPLETION,
    TEXT,
    TOKENS,
    Completion,
    Conversation,
    check_mapped,
    read_record,
    recognise,
    rename_fields,
)
from dstrain.data.chat.options import CHATML, RecordOptions
from dstrain.data.chat.template import BYTES_TEMPLATE, ChatTemplate, Encoded, chatml
from dstrain.data.listing.file_kinds import RECORD_KINDS, TEXTS_OF_0_1
from dstrain.data.listing.sources import FormattedSource, Source
from dstrain.data.reading.documents import read_records
from dstrain.data.reading.own_documents import OwnSource
from dstrain.data.reading.records import JsonRecord
from dstrain.data.token_files.corpus import TokenFiles, token_files
from dstrain.data.token_files.records import TokenRecords
from dstrain.data.tokenizing.tokenizer_files import BYTES
from dstrain.data.tokenizing.tokenizers import Tokenizer
from dstrain.errors import DstrainError

_BATCH = 2**19
"""Characters that are tokenized at once."""
_OVERHEAD = 64
"""What a record of any length counts for."""


@dataclass(frozen=True)
class ConversationSource(FormattedSource):
    """The files of a corpus whose records are conversations, or prompts and completions.

    Attributes:
        format: one of `dstrain.data.chat.formats.FORMATS`, but text and tokens.
        first: the place of the record that told the format; empty where it was named.
    """

    format: str
    options: RecordOptions
    template: ChatTemplate
    first: str = ""

    @property
    def state(self) -> list[Any]:
        """As of a `Source`."""
        fields = sorted(self.options.data_fields.items())
        options = [self.format, fields, self.template.fingerprint, self.options.on_bad_record]
        return [*self.source.state, *options]


Corpus = Source | OwnSource | ConversationSource | TokenRecords | TokenFiles


def listed_source(corpus: Corpus) -> Source | OwnSource:
    """The files of a corpus, or its code, whatever its format."""
    return corpus.source if isinstance(corpus, FormattedSource) else corpus


def source_of(
    source: Source, options: RecordOptions, tokenizer: Tokenizer
) -> Source | ConversationSource | TokenRecords | TokenFiles:
    """The corpus in the format that its records have: that which is named, or that of the first record.

    Raises:
        DstrainError: the format can't be told, files of other formats lie beside it, or there is no chat template.
    """
    if unknown := sorted(options.data_fields.keys() - FIELDS):
        raise DstrainError(
            f"data_fields: no format has a field {unknown[0]!r}",
            where="data_fields",
            hint=f"{{{', '.join(sorted(FIELDS))}}}: the name in your files",
        )
    if (tokens := token_files(source, options.data_format)) is not None:
        return tokens
    lines = [file for file in source.files if file.kind in RECORD_KINDS]
    format_name = options.data_format
    text_field, first = options.data_fields.get("text", "text"), ""
    if format_name == "auto":
        format_name, text_field, first = (
            _format_of_first(source, options) if lines else (TEXT, text_field, first)
        )
    if format_name in (TEXT, TEXTS_OF_0_1):
        return replace(source, text_field=text_field, first_text=first, on_bad_record=options.on_bad_record)
    texts = [file for file in source.files if file.kind == "text"]
    if texts:
        found = f"; {lines[0].relative} holds {format_name}" if lines else ""
        raise DstrainError(
            f"{texts[0].relative} is a text, and no {format_name} records{found}",
            where=source.place,
            hint="name the file, or a folder without texts; data_format: text reads all as documents",
        )
    if format_name == TOKENS:
        return TokenRecords(source, options, first)
    needs_none = format_name == PROMPT_COMPLETION and options.chat_template is None
    text = options.template_text
    if not text and (tokenizer.chat_template or not needs_none):
        text = template_text(options.chat_template, tokenizer)
    template = ChatTemplate(
        tokenizer, source=text, train_on=options.train_on, train_stop_token=options.train_stop_token
    )
    return ConversationSource(source, format_name, options, template, first)


def _format_of_first(source: Source, options: RecordOptions) -> tuple[str, str, str]:
    """The format of the first record that has one, the field that holds a text, and the record's place."""
    named = options.data_fields.get("text")
    first: DstrainError | None = None
    for record in read_records(source, keep_errors=True, check_all=False):
        try:
            if record.error is not None:
                raise record.error
            check_mapped(record.fields, options.data_fields)
            fields = rename_fields(record.fields, options.data_fields)
            format_name = recognise(fields)
        except DstrainError as error:
            first = first or record.placed(error)
            if options.on_bad_record == "error":
                raise first from None
            continue
        if format_name == TEXT and "text" not in fields and named is None:
            return TEXT, next(iter(fields)), record.where
        return format_name, named or "text", record.where
    if first is not None:
        raise first
    return TEXT, named or "text", ""  # which says that there is nothing


def template_text(name: str | None, tokenizer: Tokenizer) -> str:
    """A chat template: the tokenizer's own, one of its by name, ``chatml``, or that in a file.

    Raises:
        DstrainError: there is none of that name, or the tokenizer has none.
    """
    own = tokenizer.chat_template
    named = own if isinstance(own, dict) else {}
    if name is None:
        if isinstance(own, str):
            return own
        if "default" in named:
            return named["default"]
        if tokenizer.name == BYTES:
            return BYTES_TEMPLATE
        choices = f", or one of its own: {', '.join(sorted(named))}" if named else ""
        raise DstrainError(
            f"the tokenizer {tokenizer.name} has no chat template",
            hint=f"chat_template: {CHATML}, or a file with a Jinja template{choices}; an instruct model's tokenizer"
            " brings one",
            where="chat_template",
        )
    if name in named:
        return named[name]
    if name == CHATML:
        return chatml(tokenizer)
    try:
        return Path(name).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise DstrainError(
            f"the chat template can't be read: {reason}",
            where=name if len(name) < 300 else "chat_template",
            hint=f"{', '.join([CHATML, *sorted(named)])}, or the path of a file with the template",
        ) from None


def record_batches(records: Iterable[JsonRecord]) -> Iterator[list[JsonRecord]]:
    """The records in batches that are tokenized at once."""
    batch: list[JsonRecord] = []
    size = 0
    for record in records:
        batch.append(record)
        size += _OVERHEAD + characters(record.fields)
        if size > _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def characters(value: Any) -> int:
    """Of all texts in a JSON value."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(characters, value.values()))
    return sum(map(characters, value)) if isinstance(value, list) else 0


def encode_records(corpus: ConversationSource, batch: Sequence[JsonRecord]) -> list[Encoded | DstrainError]:
    """The tokens of records in their order; the error of one that can't be trained on."""
    read: list[Conversation | Completion | DstrainError] = []
    for record in batch:
        try:
            if record.error is not None:
                raise record.error
            fields = rename_fields(record.fields, corpus.options.data_fields)
            content = read_record(fields, corpus.format, corpus.first)
            assert not isinstance(content, str), "texts are written elsewhere"
            read.append(content)
        except DstrainError as error:
            read.append(error)
    encoded = iter(corpus.template.encode_batch([one for one in read if not isinstance(one, DstrainError)]))
    return [one if isinstance(one, DstrainError) else next(encoded) for one in read]
