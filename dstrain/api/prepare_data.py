"""Prepares the data of a plan in processes of their own, also where code of the user's own gives them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dstrain.api.events import Events, progress_to
from dstrain.api.hub_data import Commits, at_commits, fetch_data
from dstrain.config.files import cache_folder, cache_note
from dstrain.config.loader import ResolvedConfig
from dstrain.data.dataset_summary_cache import (
    read_summary,
    summary_file,
    tokenizer_state,
    tokens_of_summary,
)
from dstrain.data.listing.sources import Choices, Source, find_files
from dstrain.data.reading.own_documents import OwnSource, read_answer
from dstrain.data.streaming.hub_listing import read_files
from dstrain.errors import DstrainError
from dstrain.planning.data_parts import DataPart, combine, data_parts
from dstrain.planning.plan import PlannedData
from dstrain.plugins import Plugin, PluginError, check_plugin
from dstrain.shared_caches import clear_leftovers
from dstrain.strict_json import to_json

# The user's code is run twice before its documents are trusted, and hashes of Python's differ between the two: what
# comes in the order of a set shows.
_HASH_SEEDS = {
    "dstrain.data.reading.own_documents": "1",
    "dstrain.data.prepare": "2",
    "dstrain.data.show": "2",
}


def prepare_data(
    resolved: ResolvedConfig, tokenizer: str, events: Events, *, commits: Commits | None = None
) -> PlannedData:
    """Tokenise the data into the cache, where the ranks will find them, and say what they hold.

    What was found out about the same data before is read instead, where their tokens are still as they were. Documents
    that code gives are read for that in any case, in a process of its own.

    Args:
        commits: of data sets on the hub that were planned before.

    Raises:
        DstrainError: the data can't be used.
    """
    sources = _sources(resolved, events, commits)
    data = [_prepared(part, source, resolved, tokenizer, events) for part, source in sources]
    return combine(resolved.config, [part for part, _ in sources], data)


@dataclass(frozen=True)
class PreparedSource:
    """The tokens of a source in the cache.

    Attributes:
        name: of the source.
        data: what it holds.
        folder: where its tokens lie; empty for a stream, of which nothing is tokenized ahead.
        seconds: what it took to tokenize it, or to find that it was there.
        was_there: its tokens lay in the cache before.
    """

    name: str
    data: PlannedData
    folder: str
    seconds: float
    was_there: bool


def prepare_sources(
    resolved: ResolvedConfig, tokenizer: str, events: Events, *, workers: int | None = None
) -> list[PreparedSource]:
    """`prepare_data`, source by source.

    Args:
        workers: processes that tokenize; 0: one that does it alone; None: as many as are worth their start.

    Raises:
        DstrainError: the data can't be used.
    """
    found, cache = [], cache_folder() / "data"
    for part, source in _sources(resolved, events):
        before = _entries(cache)
        start = time.monotonic()
        data = _prepared(part, source, resolved, tokenizer, events, workers=workers)
        seconds = time.monotonic() - start
        if data.streamed:
            found.append(PreparedSource(part.name, data, "", seconds, was_there=False))
            continue
        folder, there = cache, True  # in a cache that can't be written no summary names its folder
        with suppress(OSError):
            folder = tokens_of_summary(_summary_file(part, source, resolved, tokenizer))
            there = before.get(folder.name) == folder.stat().st_ino
        found.append(PreparedSource(part.name, data, str(folder), seconds, there))
    return found


def _sources(
    resolved: ResolvedConfig, events: Events, commits: Commits | None = None
) -> list[tuple[DataPart, Source | OwnSource]]:
    """All that is read, with its files or its code; nothing of it is tokenized yet."""
    cache = cache_folder() / "data"
    clear_leftovers(cache_folder())
    if note := cache_note():
        events.note(note)
    found: list[tuple[DataPart, Source | OwnSource]] = []
    for part in at_commits(data_parts(resolved.config), commits or {}):
        with _named(part, resolved):
            found.append((part, _own_source(part, resolved, events) or _files(part, cache, resolved, events)))
    _refuse_overlap(found, resolved)
    return found


def _entries(folder: Path) -> dict[str, int]:
    """What lies in a folder, with the number of each in its file system: what is made anew has another one."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name: entry.inode() for entry in entries}
    except FileNotFoundError:
        return {}


def _summary_file(
    part: DataPart, source: Source | OwnSource, resolved: ResolvedConfig, tokenizer: str
) -> Path:
    cache, state = cache_folder() / "data", tokenizer_state(tokenizer)
    return summary_file(cache, source, state, **part.choices(resolved.config), records=part.records.state)


@contextmanager
def _named(part: DataPart, resolved: ResolvedConfig) -> Iterator[None]:
    """Around what is done with one of several sources: an error says which."""
    try:
        yield
    except DstrainError as error:
        if isinstance(resolved.config.data, list) or not part.trained:
            kind = "source" if part.trained else "validation set"
            error.message = f"{kind} {part.name}: {error.message}"
        raise


def _refuse_overlap(found: Sequence[tuple[DataPart, Source | OwnSource]], resolved: ResolvedConfig) -> None:
    """What is trained on measures nothing. Raises DstrainError where a validation set has some of it."""
    where = str(resolved.origin("validation" if isinstance(resolved.config.validation, list) else "data"))
    trained = {place: part for part, source in found if part.trained for place in _places(part, source)}
    for part, source in found:
        for place in () if part.trained else _places(part, source):
            if place in trained:
                raise DstrainError(
                    f"validation set {part.name}: {place} is trained on too, in source {trained[place].name}",
                    where=where,
                    hint="remove it from one of them; validation: 0.05 holds back a part of what is trained on",
                )


def _places(part: DataPart, source: Source | OwnSource) -> Iterator[str]:
    """What tells its files, the split that they are of, or its code with its options, from others."""
    if isinstance(source, Source) and source.commit:
        yield str(part.at(source.commit).hub_name)
    if isinstance(source, OwnSource):
        yield f"{part.path} {to_json(part.options)}"
    for file in source.files:
        yield os.path.abspath(file.path)


def _prepared(
    part: DataPart,
    source: Source | OwnSource,
    resolved: ResolvedConfig,
    tokenizer: str,
    events: Events,
    *,
    workers: int | None = None,
) -> PlannedData:
    """What a source holds, with its tokens in the cache."""
    with _named(part, resolved):
        if isinstance(source, OwnSource):
            return _tokenized(part, source, resolved, tokenizer, events, workers)
        if part.streamed:
            asked = {
                "stream": part.at(source.commit).stream_request(
                    resolved.config, tokenizer=tokenizer, cache_dir=cache_folder() / "data"
                ),
                "validation": part.validation,
                "samples": resolved.config.eval_samples,
                "limit": part.limit,
            }
            known = _asked("dstrain.data.streaming.prepare", asked, part, resolved, events)
            data = PlannedData.from_record(known)
        else:
            data = _tokenized(part, source, resolved, tokenizer, events, workers)
    return replace(data, kinds=source.kinds, left_out=source.left_out, commit=source.commit)


def _tokenized(
    part: DataPart,
    source: Source | OwnSource,
    resolved: ResolvedConfig,
    tokenizer: str,
    events: Events,
    workers: int | None,
) -> PlannedData:
    known = read_summary(_summary_file(part, source, resolved, tokenizer))
    if known is None:
        cache = cache_folder() / "data"
        request = part.request(resolved.config, tokenizer=tokenizer, cache_dir=cache, own=_code(source))
        request |= {} if workers is None else {"workers": workers}
        known = _asked("dstrain.data.prepare", request, part, resolved, events)
    return PlannedData.from_record(known)


def _code(source: Source | OwnSource) -> OwnSource | None:
    return source if isinstance(source, OwnSource) else None


def _files(part: DataPart, cache: Path, resolved: ResolvedConfig, events: Events) -> Source:
    """The files of a source, fetched from the hub where they lie there."""
    where = str(resolved.origin("data" if part.trained else "validation"))
    fetch_data(part, cache, events, where=where)
    name = part.hub_name
    if part.streamed and name is not None and (listing := read_files(name, cache)) is not None:
        return listing.source(part.path, Choices(**part.selection))
    return replace(find_files(part.path, cache=cache, **part.selection), limit=part.limit)


def look_at_data(
    resolved: ResolvedConfig, tokenizer: str, samples: Sequence[int], events: Events, *, each_token: bool
) -> dict[str, Any]:
    """Training samples in pieces, and statistics of the data unless they are streamed: see `dstrain.data.show`.

    Raises:
        DstrainError: the data can't be used.
    """
    config, cache = resolved.config, cache_folder() / "data"
    if config.data_stream and not samples:
        raise DstrainError(
            "a stream has no statistics: what it holds is not known before it is read",
            where=str(resolved.origin("data_stream")),
            hint="--set data_stream=false reads all of the data; dstrain data show shows the first samples of a stream",
        )
    sources = _sources(resolved, events)
    parts = [part for part, _ in sources]
    data = [_prepared(part, source, resolved, tokenizer, events) for part, source in sources]
    planned = combine(config, parts, data)
    request = {
        "parts": [
            {
                "name": part.name,
                "trained": part.trained,
                **(
                    _stream(part, held, resolved, tokenizer)
                    if held.streamed
                    else {
                        "request": part.request(
                            config, tokenizer=tokenizer, cache_dir=cache, own=_code(source)
                        )
                    }
                ),
            }
            for (part, source), held in zip(sources, data, strict=True)
        ],
        "folder": str(cache_folder() / "streams"),
        "phases": [asdict(phase) for phase in planned.phases],
        "samples": list(samples),
        "each_token": each_token,
        "global_batch": config.global_batch,
        "seed": config.seed,
    }
    code = next((part for part in parts if part.is_code), parts[0])
    answer = _asked("dstrain.data.show", request, code, resolved, events)
    answer["statistics"] |= asdict(planned)
    return answer


def _stream(part: DataPart, data: PlannedData, resolved: ResolvedConfig, tokenizer: str) -> dict[str, Any]:
    """A stream, for `dstrain.data.show`."""
    asked = part.at(data.commit).stream_request(
        resolved.config,
        tokenizer=tokenizer,
        cache_dir=cache_folder() / "data",
        held_until=data.held_until,
        limit_until=data.limit_until,
    )
    return {"stream": asked, "fingerprint": data.fingerprint}


def check_plugin_here(plugin: Plugin, resolved: ResolvedConfig) -> None:
    """Refuse code of the user's own that this machine does not have; nothing of it is run. Raises PluginError."""
    where = str(resolved.origin(plugin.key))
    try:
        check_plugin(plugin.name, resolved.config.code_dirs or (), what=plugin.what, where=where)
    except PluginError as error:
        if plugin.key == "data" and Path(plugin.name).exists():
            error.hint = f"the file of that name is --data ./{plugin.name}; {error.hint}"
        raise


def _own_source(part: DataPart, resolved: ResolvedConfig, events: Events) -> OwnSource | None:
    """The documents of the user's code, read once for their hash; None where the source is files."""
    if not part.is_code:
        return None
    for choice in ("config", "split", "revision"):
        if (value := getattr(part, choice)) is not None:
            raise DstrainError(
                f"{choice} ({value}) is for data sets on the hub, and {part.path} is code of your own",
                where=str(resolved.origin("data" if part.trained else "validation")),
                hint=f"make it an option of your function: options: {{{choice}: {value}}}",
            )
    check_plugin_here(Plugin("data", "dataset", part.path), resolved)
    called: dict[str, Any] = {
        "name": part.path,
        "options": part.options,
        "folders": resolved.config.code_dirs or [],
    }
    found = _asked("dstrain.data.reading.own_documents", called, part, resolved, events)
    return OwnSource(**called, **found)


def _asked(
    module: str, request: Mapping[str, Any], part: DataPart, resolved: ResolvedConfig, events: Events
) -> dict[str, Any]:
    """What a module answers to a request, both as JSON."""
    import tempfile

    from dstrain.child_process import run_module

    name, user_code = part.path, part.is_code
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "request.json", Path(folder) / "answer.json"
        asked.write_text(to_json(request), encoding="utf-8")
        environment = {"PYTHONHASHSEED": _HASH_SEEDS[module]} if user_code else {}
        failed = ""
        try:
            run_module(
                module,
                str(asked),
                str(answered),
                say=progress_to(events),
                user_code=user_code,
                environment=environment,
            )
        except DstrainError as error:
            if not user_code:
                raise
            failed = error.message
        try:
            return read_answer(answered, name, failed)
        except DstrainError as error:
            error.where = error.where or str(resolved.origin("data"))
            raise
