"""What of a config is read, source by source, and what all of them hold together."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dstrain.config.data_sources import ValidationSource, steps_of_phases, weights_by_phase
from dstrain.config.schema import RunConfig
from dstrain.data.chat.options import RecordOptions
from dstrain.data.listing.hub_names import HubName, hub_name
from dstrain.data.reading.own_documents import OwnSource
from dstrain.mixture_shares import MixturePhase, parts_of, row_shares, rows_before
from dstrain.planning.plan import PlannedData, PlannedSource
from dstrain.plugins import is_code
from dstrain.strict_json import to_json


@dataclass(frozen=True)
class DataPart:
    """One source of a config.

    Attributes:
        name: in the plan and in metrics.
        path: a file, a folder, ..., or the name of the user's own code.
        trained: whether it is trained on; else it is a validation set.
        validation: the fraction of its documents that is held back for a validation set.
        records: the format of its records, and what of conversations is trained.
        limit: the number of documents to read; None: all.
        config, split, revision: which part of a data set that has several.
        options: of the user's own code.
        streamed: whether it is read while it is trained on.
    """

    name: str
    path: str
    trained: bool
    validation: float
    records: RecordOptions
    limit: int | None
    options: dict[str, Any]
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    streamed: bool = False

    @property
    def selection(self) -> dict[str, Any]:
        """What `dstrain.data.listing.sources.find_files` finds it with, beside its path."""
        return {
            "data_format": self.records.data_format,
            "data_fields": self.records.data_fields,
            **self._part_of_set,
        }

    @property
    def hub_name(self) -> HubName | None:
        """What it asks of the hub; None for what is here."""
        return hub_name(self.path, **self._part_of_set)

    def at(self, commit: str) -> DataPart:
        """The same at a commit of the hub; as it is where there is none."""
        return replace(self, revision=commit) if commit else self

    @property
    def _part_of_set(self) -> dict[str, Any]:
        return {"config": self.config, "split": self.split, "revision": self.revision}

    @property
    def is_code(self) -> bool:
        """Whether the user's own code gives its documents."""
        return is_code(self.path)

    def choices(self, config: RunConfig) -> dict[str, Any]:
        """What is chosen of it beside its path, its tokenizer and its records."""
        return {
            "seq_len": config.seq_len,
            "validation": self.validation,
            "pack": config.pack,
            "begin": config.begin_token,
        }

    def request(
        self, config: RunConfig, *, tokenizer: str, cache_dir: Path, own: OwnSource | None, template: str = ""
    ) -> dict[str, Any]:
        """The arguments of `dstrain.data.prepare.prepare`, as JSON values.

        Args:
            own: its documents, where code gives them.
            template: the chat template itself, where a plan holds it.
        """
        return {
            **(own.request() if own else {"source": self.path}),
            "tokenizer": tokenizer,
            "cache_dir": str(cache_dir),
            **self.choices(config),
            "max_document_bytes": config.max_document_bytes,
            "records": asdict(replace(self.records, template_text=template)),
            **({} if self.limit is None else {"limit": self.limit}),
            **({} if self.trained else {"use": "validation"}),
            **{name: value for name, value in self._part_of_set.items() if value is not None},
        }

    def stream_request(
        self,
        config: RunConfig,
        *,
        tokenizer: str,
        cache_dir: Path,
        template: str = "",
        held_until: tuple[int, int] | None = None,
        limit_until: tuple[int, int] | None = None,
    ) -> dict[str, Any]:
        """A `dstrain.data.streaming.stream.StreamRequest`, as JSON values.

        Args:
            template: as of `request`.
            held_until: up to which file and record documents are held back for validation; None: none.
            limit_until: up to which documents are read; None: all, or it is not known yet.
        """
        held = None
        if held_until is not None:
            held = {"fraction": self.validation, "shard": held_until[0], "record": held_until[1]}
        return {
            "source": self.path,
            "tokenizer": tokenizer,
            "seq_len": config.seq_len,
            "seed": config.seed,
            "begin": config.begin_token,
            "pack": config.pack,
            "max_document_bytes": config.max_document_bytes,
            "records": asdict(replace(self.records, template_text=template)),
            **self._part_of_set,
            "held": held,
            "end": limit_until,
            "cache": str(cache_dir),
        }


def data_parts(config: RunConfig) -> tuple[DataPart, ...]:
    """All that a config reads: first what is trained on, then the validation sets that are no part of it."""

    def part(source: ValidationSource, path: str, trained: bool, validation: float) -> DataPart:
        records = RecordOptions.of(config)
        if source.format is not None:
            records = replace(records, data_format=source.format)
        if source.fields is not None:
            records = replace(records, data_fields=source.fields)
        options = config.data_options if isinstance(config.data, str) and trained else source.options
        own = path == source.path  # and no validation set beside it
        shared = own or hub_name(path) is not None  # a path here has neither config nor revision
        return DataPart(
            source.called,
            path,
            trained,
            validation,
            records,
            source.limit if own else None,
            options,
            config=source.config if shared else None,
            split=source.split if own else None,
            revision=source.revision if shared else None,
            streamed=config.data_stream and trained,
        )

    sets = config.validation if isinstance(config.validation, list) else []
    fraction = 0.0 if isinstance(config.validation, list) else config.validation
    found = []
    for source in config.sources:
        own = fraction if source.validation is None else source.validation
        found.append(part(source, source.path, True, 0.0 if isinstance(own, str) else own))
    for source in config.sources:
        if isinstance(source.validation, str):
            found.append(part(source, source.validation, False, 0.0))
    found.extend(part(entry, entry.path, False, 0.0) for entry in sets)
    return tuple(found)


def combine(config: RunConfig, parts: Sequence[DataPart], planned: Sequence[PlannedData]) -> PlannedData:
    """What all parts hold together; for a single one, what it holds."""
    if len(parts) == 1:
        return planned[0]
    trained = [data for part, data in zip(parts, planned, strict=True) if part.trained]
    names = [part.name for part in parts if part.trained]
    sets = [data for part, data in zip(parts, planned, strict=True) if not part.trained]
    phases = _phases(config, names, trained) if len(trained) > 1 else ()
    given = [config.steps * config.global_batch]
    if phases:
        given = rows_before(phases, config.global_batch, len(trained))[-1][1]
    taken = [*given, *([0] * len(sets))]
    sources = tuple(
        PlannedSource(part.name, part.trained, rows, replace(data, sources=(), phases=()))
        for part, data, rows in zip(parts, planned, taken, strict=True)
    )
    rows = sum(data.train_rows for data in trained)
    conversations = [data for data in trained if data.trained_tokens is not None]
    all_conversations = len(conversations) == len(trained)
    formats = {data.format for data in trained}
    templates = [data.chat_template for data in trained if data.chat_template]
    return replace(
        trained[0],
        source=", ".join(names),
        files=sum(data.files for data in trained),
        bytes=sum(data.bytes for data in trained),
        documents=sum(data.documents for data in trained),
        validation_documents=sum(data.validation_documents for data in trained)
        + sum(data.documents for data in sets),
        empty_documents=sum(data.empty_documents for data in trained),
        tokens=sum(data.tokens for data in trained),
        train_rows=rows,
        validation_rows=sum(data.validation_rows for data in trained) + sum(data.train_rows for data in sets),
        padding=sum(data.padding * data.train_rows for data in trained) / rows,
        fingerprint=_fingerprint(names, trained, phases) if phases else trained[0].fingerprint,
        documents_hash="",
        kinds="",
        left_out="",
        commit="",
        format=formats.pop() if len(formats) == 1 else "several",
        train_on=conversations[0].train_on if conversations else "",
        trained_tokens=sum(data.trained_tokens or 0 for data in conversations) if all_conversations else None,
        cut_documents=sum(data.cut_documents for data in trained),
        dropped_documents=sum(data.dropped_documents for data in trained),
        text_field="",
        chat_template=templates[0] if templates else "",
        stop_tokens=tuple(sorted({token for data in trained for token in data.stop_tokens})),
        sources=sources,
        phases=phases,
        held_until=None,
        limit_until=None,
    )


def _phases(
    config: RunConfig, names: Sequence[str], trained: Sequence[PlannedData]
) -> tuple[MixturePhase, ...]:
    phases = weights_by_phase(config.sources, config.data_phases)
    ends = steps_of_phases(phases, config.steps)
    rows = [data.train_rows for data in trained]
    if config.data_weight_by == "documents":
        counts = [data.documents - data.dropped_documents - data.validation_documents for data in trained]
        sizes = [count / data.train_rows for count, data in zip(counts, trained, strict=True)]
    else:
        sizes = [(1 - data.padding) * data.seq_len for data in trained]
    return tuple(
        MixturePhase(end, parts_of(row_shares([weights[name] for name in names], sizes, rows)))
        for end, (_, weights) in zip(ends, phases, strict=True)
    )


def _fingerprint(names: Sequence[str], trained: Sequence[PlannedData], phases: Sequence[MixturePhase]) -> str:
    """Of all that is trained on: the rows of each source, and which of them come when.

    When the last phase ends is no part of it: a run may be given more steps.
    """
    rows = [[name, data.fingerprint] for name, data in zip(names, trained, strict=True)]
    weights = [[phase.last_step, phase.parts] for phase in phases[:-1]]
    content = to_json([rows, weights, phases[-1].parts])
    return hashlib.sha256(content.encode()).hexdigest()[:32]
