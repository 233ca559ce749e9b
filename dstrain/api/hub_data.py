"""Data sets that the config names as they are called on the hub: fetched in a process of its own, and kept to the
commits that were planned with."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from dstrain.api.events import Events, progress_to
from dstrain.child_process import run_module
from dstrain.data.listing.hub_names import read_listing
from dstrain.data.streaming.hub_listing import read_files
from dstrain.errors import DstrainError
from dstrain.planning.data_parts import DataPart, data_parts
from dstrain.planning.plan import Plan
from dstrain.runs.run_folder import RunFolder
from dstrain.strict_json import to_json

Commits = Mapping[tuple[str | None, ...], str]
"""Path, config, split and revision of a source -> the commit that was planned with."""


def planned_commits(folder: RunFolder) -> Commits:
    """Those of a run's data sets, so that it goes on with what it has begun with; none where it has no plan."""
    with suppress(DstrainError):
        plan = Plan.read(folder.plan)
        parts = zip(data_parts(plan.run_config), plan.data.parts, strict=False)
        return {_key(part): data.commit for part, data in parts if data.commit}
    return {}


def at_commits(parts: Sequence[DataPart], commits: Commits) -> list[DataPart]:
    """The same sources, at the commits of those that have one."""
    return [part.at(commits.get(_key(part), "")) for part in parts]


def _key(part: DataPart) -> tuple[str | None, ...]:
    return part.path, part.config, part.split, part.revision


def fetch_data(part: DataPart, cache: Path, events: Events, *, where: str) -> None:
    """Fetch the data set that a source names, so that its files are found on this machine; of one that is streamed,
    list them. Nothing for a path.

    Args:
        cache: the folder of prepared data.
        where: what names the source, for the message.

    Raises:
        DstrainError: it can't be fetched, or listed.
    """
    name = part.hub_name
    read = read_files(name, cache) if part.streamed and name else name and read_listing(name.listing(cache))
    if name is None or (name.is_pinned and read is not None):
        return
    module = "dstrain.data.streaming.hub_shards" if part.streamed else "dstrain.data.listing.hub_datasets"
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "request.json", Path(folder) / "answer.json"
        asked.write_text(to_json({**asdict(name), "cache": str(cache)}), encoding="utf-8")
        try:
            run_module(module, str(asked), str(answered), say=progress_to(events))
        except DstrainError as error:
            raise DstrainError(f"{where}: {error}", exit_code=error.exit_code) from None
        for note in json.loads(answered.read_text(encoding="utf-8"))["notes"]:
            events.note(note)
