"""Fetches a data set that the config names as it is called on the hub, in a process of its own."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path

from dstrain.api.events import Events, progress_to
from dstrain.child_process import run_module
from dstrain.data.hub_names import hub_name, read_listing
from dstrain.errors import DstrainError
from dstrain.strict_json import to_json


def fetch_data(
    source: str,
    cache: Path,
    events: Events,
    *,
    where: str,
    config: str | None = None,
    split: str | None = None,
    revision: str | None = None,
) -> None:
    """Fetch the data set that ``source`` names, so that `dstrain.data.sources` finds its files; nothing for a path.

    Args:
        cache: the folder of prepared data.
        where: what names the source, for the message.

    Raises:
        DstrainError: it can't be fetched.
    """
    name = hub_name(source, config=config, split=split, revision=revision)
    if name is None or (name.is_pinned and read_listing(name.listing(cache)) is not None):
        return
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "request.json", Path(folder) / "answer.json"
        asked.write_text(to_json({**asdict(name), "cache": str(cache)}), encoding="utf-8")
        try:
            run_module("dstrain.data.hub_datasets", str(asked), str(answered), say=progress_to(events))
        except DstrainError as error:
            raise DstrainError(f"{where}: {error}", exit_code=error.exit_code) from None
        for note in json.loads(answered.read_text(encoding="utf-8"))["notes"]:
            events.note(note)
