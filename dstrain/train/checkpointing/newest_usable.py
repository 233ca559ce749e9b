"""Chooses the checkpoint to resume from: the same on all ranks, with every byte verified."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import distributed

from dstrain.errors import DstrainError
from dstrain.json_collectives import all_gather_json, broadcast_json
from dstrain.runs.checkpoint.manifest import (
    MANIFEST,
    Choice,
    choose_newest,
    files_of,
    is_lasting,
    note_damage,
    passed_over,
    read_manifest,
    share_out,
    unreadable,
    wrong_files,
)


def find_newest_usable(
    folder: Path, run: str, damaged: dict[str, str], say: Callable[[str], None]
) -> Path | None:
    """The newest checkpoint of this run all of whose bytes are those that were saved. Collective.

    Args:
        folder: ``checkpoints/`` of the run folder.
        run: the run's id.
        damaged: by name, why a checkpoint's bytes are wrong, as far as that was found before; is added to.
        say: takes a line for the user about each that is passed over; called on rank 0 alone.

    Returns:
        None where no checkpoint was made yet.

    Raises:
        DstrainError: there are checkpoints, and none is usable; on every rank.
    """
    rank = distributed.get_rank()
    while True:
        choice = _choose(folder, run, damaged)
        checkpoint = choice.checkpoint
        if checkpoint is None:
            return None
        why = _wrong_bytes(checkpoint, say)
        if why is None:
            for name, reason in choice.passed if rank == 0 else ():
                say(passed_over(name, reason, checkpoint.name))
            return checkpoint
        damaged[checkpoint.name] = why
        if rank == 0 and is_lasting(why):
            try:
                note_damage(checkpoint, why)
            except OSError as error:  # a disk that is full, or can't be written: it is said all the same
                print(f"{checkpoint}: its damage could not be recorded: {error}")


def _choose(folder: Path, run: str, damaged: dict[str, str]) -> Choice:
    """Rank 0 looks at names, manifests and sizes, so that all ranks choose alike."""
    told: dict[str, Any] = {}
    if distributed.get_rank() == 0:
        try:
            choice = choose_newest(folder, run, damaged)
            told = {"name": choice.checkpoint.name if choice.checkpoint else None, "passed": choice.passed}
        except DstrainError as error:
            told = {"refusal": {"message": error.message, "hint": error.hint, "where": error.where}}
    told = broadcast_json(told)
    if "refusal" in told:
        raise DstrainError(**told["refusal"])
    passed = tuple((name, why) for name, why in told["passed"])
    return Choice(folder / told["name"] if told["name"] is not None else None, passed)


def _wrong_bytes(checkpoint: Path, say: Callable[[str], None]) -> str | None:
    """What is wrong with the first wrong file, the same on all ranks; each reads its share."""
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    try:
        files = files_of(read_manifest(checkpoint))
    except (OSError, ValueError) as error:  # rank 0 could read it a moment ago
        wrong = {MANIFEST: unreadable(MANIFEST, error)}
    else:
        if rank == 0 and any(file.sha256 is None for file in files.values()):
            say(f"{checkpoint.name} was saved by an older dstrain, without checksums: only sizes are checked")
        share = share_out({name: file.size for name, file in files.items()}, ranks)[rank]
        wrong = wrong_files(checkpoint, files, share)
    parts: list[dict[str, str]] = all_gather_json(wrong)
    found = {name: why for part in parts for name, why in part.items()}
    if not found:
        return None
    more = f", and {len(found) - 1} more of its files" if len(found) > 1 else ""
    first = min(found, key=lambda name: (not is_lasting(found[name]), name))
    return found[first] + more
