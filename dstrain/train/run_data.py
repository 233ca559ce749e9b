"""Checks that each host has the data and the model config that the plan was made for.

A host without a disk in common with the others needs copies of the same files; it tokenizes them by itself.
"""

from __future__ import annotations

import hashlib
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

from dstrain.child_process import run_module
from dstrain.config.files import cache_folder
from dstrain.data.prepare import PackedData, prepare_as_asked
from dstrain.data.reading.own_documents import OwnSource, read_answer
from dstrain.data.streaming.prepare import StreamedData, prepare_stream
from dstrain.data.streaming.stream import StreamRequest
from dstrain.data.token_cache import is_cached
from dstrain.data.tokenizing.tokenizers import load_tokenizer
from dstrain.data.training_data import TrainingData, TrainingSource, training_data
from dstrain.errors import DstrainError
from dstrain.planning.data_parts import DataPart, data_parts
from dstrain.planning.plan import Plan, PlannedData
from dstrain.strict_json import to_json


def prepare_run_data(plan: Plan) -> TrainingData:
    """The packed data, from the cache of this host, which is filled where the launch has not done that.

    Of the ranks of a host the first one tokenizes, and the others wait for it.

    Raises:
        DstrainError: they can't be read here, or are not those of the plan.
    """
    trained: list[TrainingSource] = []
    validation: list[TrainingSource] = []
    for part, known in zip(data_parts(plan.run_config), plan.data.parts, strict=True):
        found = TrainingSource(part.name, _prepare_part(plan, part, known))
        (trained if part.trained else validation).append(found)
    return training_data(trained, validation, plan.data.phases)


def _prepare_part(plan: Plan, part: DataPart, known: PlannedData) -> PackedData | StreamedData:
    """One source, which must hold what the plan knows of it."""
    part = part.at(known.commit)
    try:
        if part.streamed:
            return _prepare_stream(plan, part, known)
        own = _own_source(plan, part, known) if part.is_code else None
        data = prepare_as_asked(_request(plan, part, known, own))
    except DstrainError as error:
        if len(plan.layout.hosts) < 2:
            raise
        code = f"the module of {part.path} with what it reads" if part.is_code else part.path
        needed = [code, *([] if known.tokenizer == "bytes" else [known.tokenizer])]
        raise DstrainError(
            f"on {socket.gethostname()}: {error.message}",
            where=error.where,
            hint=f"every host needs {' and '.join(needed)}: copy what is missing, or name a folder that all share",
        ) from error
    if data.fingerprint != known.fingerprint:
        raise DstrainError(
            "the data is not what the plan was made for"
            f" ({data.fingerprint} on {socket.gethostname()}, {known.fingerprint} in the plan)",
            where=part.path,
            hint="start a new run for changed data" + _or_copy(plan),
        )
    return data


def _prepare_stream(plan: Plan, part: DataPart, known: PlannedData) -> StreamedData:
    asked = part.stream_request(
        plan.run_config,
        tokenizer=known.tokenizer,
        cache_dir=cache_folder() / "data",
        template=known.chat_template,
        held_until=known.held_until,
        limit_until=known.limit_until,
    )
    return prepare_stream(
        StreamRequest.from_json(asked),
        plan.run_config.eval_samples,
        known.fingerprint,
        part.path,
        "start a new run for changed data" + _or_copy(plan),
    )


def _request(plan: Plan, part: DataPart, known: PlannedData, own: OwnSource | None) -> dict[str, Any]:
    return part.request(
        plan.run_config,
        tokenizer=known.tokenizer,
        cache_dir=cache_folder() / "data",
        own=own,
        template=known.chat_template,
    )


def _own_source(plan: Plan, part: DataPart, known: PlannedData) -> OwnSource:
    """The documents of the user's code, with their tokens in the cache.

    Where they are not there yet, the code is called in a process of its own: it may draw random numbers, take a
    device's memory, or change a setting of torch's.

    Raises:
        DstrainError: the code fails on this host, or gives other documents than the plan's.
    """
    config = plan.run_config
    source = OwnSource(part.path, part.options, config.code_dirs or (), known.documents_hash, known.bytes)
    tokenizer = load_tokenizer(known.tokenizer, config.begin_token)
    if not is_cached(source, tokenizer, cache_folder() / "data"):
        with tempfile.TemporaryDirectory() as folder:
            asked, answered = Path(folder) / "request.json", Path(folder) / "answer.json"
            asked.write_text(to_json(_request(plan, part, known, source)), encoding="utf-8")
            failed = ""
            try:
                run_module("dstrain.data.prepare", str(asked), str(answered), say=_say, user_code=True)
            except DstrainError as error:
                failed = error.message
            read_answer(answered, source.name, failed)
    return source


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def check_model_file(plan: Plan) -> None:
    """Raises DstrainError where this host has no config of the model, or another one than the plan was made for."""
    file, host = Path(plan.model.file), socket.gethostname()
    try:
        found = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise DstrainError(
            f"{host} can't read the model's config: {error.strerror}",
            where=str(file),
            hint="copy the model's folder to the same place there, or name a folder that all hosts share",
        ) from error
    if plan.model.fingerprint and found != plan.model.fingerprint:
        raise DstrainError(
            f"the model's config on {host} is not the one that the plan was made for",
            where=str(file),
            hint="start a new run for a changed model" + _or_copy(plan),
        )


def _or_copy(plan: Plan) -> str:
    return "; or copy the same files to this host" if len(plan.layout.hosts) > 1 else ""
