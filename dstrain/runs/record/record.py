"""The record of a launch's environment, and the history of a run's launches.

Before the ranks start, ``record.json`` is written: what they will be made of. Rank 0 adds what only the ranks know,
the step that they begin with and their devices, and appends it all to ``launches.jsonl``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dstrain.errors import DstrainError
from dstrain.files import LARGEST_JSON, open_to_write, read_json, write_atomically, write_json
from dstrain.formatting import format_count
from dstrain.planning.plan import Plan
from dstrain.renamed_keys import CONFIG_KEYS, with_new_names
from dstrain.runs.record.environment import (
    image,
    own_version,
    packages,
    python_version,
    variables,
    weights_fingerprint,
)
from dstrain.runs.record.source import Source, source_of
from dstrain.runs.run_folder import RunFolder, json_lines
from dstrain.strict_json import to_json

FORMAT = 1


def write_record(folder: RunFolder, plan: Plan, environment: Mapping[str, str]) -> list[str]:
    """Write ``record.json``, and the diff of the user's folder beside it; what the user should know of them. Raises
    OSError.

    Args:
        environment: what the ranks are given.
    """
    source = source_of(Path.cwd(), besides=folder.path.parent)
    record = {
        "format": FORMAT,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "dstrain": own_version(),
        "python": python_version(),
        "packages": packages(),
        "variables": variables(environment),
        "image": image(),
        "directory": str(Path.cwd()),
        "source": {key: value for key, value in asdict(source).items() if key != "diff"} if source else None,
        "data": {key: getattr(plan.data, key) for key in ("source", "fingerprint", "tokens", "documents")},
        "tokenizer": {"name": plan.data.tokenizer, "fingerprint": plan.data.tokenizer_fingerprint},
        "model": {
            key: getattr(plan.model, key) for key in ("type", "file", "folder", "fingerprint", "parameters")
        }
        | {
            "weights": weights_fingerprint(Path(plan.model.folder))
            if plan.run_config.init == "pretrained" and plan.model.folder is not None
            else None
        },
        "config": plan.config,
        "layout": {
            "pipeline": plan.layout.pipeline,
            "data_parallel": plan.layout.data_parallel,
            "schedule": plan.layout.schedule,
            "cut": list(plan.layout.cut),
            "ranks_a_host": [host.slots for host in plan.layout.hosts],
        },
        "batch": asdict(plan.batch),
        "loss_chunk": plan.loss_chunk,
        "deepspeed": plan.deepspeed,
    }
    write_json(folder.record, record)
    if source is not None and source.diff and source.changes is not None:
        write_atomically(folder.source_diff(source.changes), source.diff)
    return _notes(folder, source)


def _notes(folder: RunFolder, source: Source | None) -> list[str]:
    if source is not None and source.refused:
        return [f"the record says nothing of the git repository of {source.folder}: {source.refused}"]
    if source is not None and source.left_out and source.changes is not None:
        places = format_count(source.left_out, "place")
        return [f"{folder.source_diff(source.changes).name} leaves out {places} that look like secrets"]
    return []


def append_launch(folder: RunFolder, first_step: int, devices: Sequence[Mapping[str, Any]]) -> None:
    """Rank 0's word: the ranks have met, and begin with this step on these devices.

    A rank 0 that does not see the folder that the run was started from knows only its own part.

    Raises:
        OSError: one of the two files can't be read or written.
        DstrainError: the record is no record.
    """
    try:
        record = read_json(folder.record)
    except FileNotFoundError:
        record = {"format": FORMAT}
    except ValueError as error:
        raise DstrainError(
            f"what was recorded of this launch can't be read: {error}",
            where=str(folder.record),
            hint="dstrain resume RUN records it anew",
            exit_code=1,
        ) from error
    line = to_json(record | {"first_step": first_step, "devices": list(devices)}, sort_keys=True)
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT
    with open(open_to_write(folder.launches, flags), "a+b") as file:
        if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
            file.write(b"\n")  # a launch was killed while it wrote its line
        file.write(line.encode() + b"\n")


def read_launches(folder: RunFolder) -> list[dict[str, Any]]:
    """Every launch of a run that came as far as to train, in their order.

    Raises:
        DstrainError: there is none, or it is of another format.
    """
    launches = []
    for launch in json_lines(
        folder.launches, LARGEST_JSON
    ):  # without half a line of a launch that was killed
        if "first_step" in launch:
            if "config" in launch:
                launch["config"] = with_new_names(launch["config"], CONFIG_KEYS)
            launches.append(launch)
    where = str(folder.launches)
    hint = f"`dstrain run --config {folder.config} --name NAME` trains it again without comparing"
    if not launches:
        raise DstrainError(
            "the run has no record of its environment: it never started training, or an older dstrain made it",
            where=where,
            hint=hint,
        )
    formats = {launch.get("format") for launch in launches} - {FORMAT}
    if formats:
        raise DstrainError(
            f"the record has format {formats.pop()}, and this dstrain reads {FORMAT}",
            where=where,
            hint=hint,
        )
    return launches


def first_launch(launches: Sequence[dict[str, Any]], folder: RunFolder) -> dict[str, Any]:
    """The launch that trained the first steps: the last one that began with step 1. Raises DstrainError."""
    found = [launch for launch in launches if launch["first_step"] == 1]
    if not found:
        raise DstrainError(
            "its first steps were trained by an older dstrain, which did not record its environment",
            where=str(folder.launches),
            hint=f"train it anew: dstrain run --config {folder.config}",
        )
    if "config" not in found[-1]:
        raise DstrainError(
            "its rank 0 could not see the folder from which the run was started, and recorded only its own part",
            where=str(folder.launches),
            hint=f"train it anew: dstrain run --config {folder.config}",
        )
    return found[-1]
