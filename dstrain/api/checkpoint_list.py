"""``checkpoints``: lists the checkpoints of a run, and verifies them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

from dstrain.api.events import SILENT, Events
from dstrain.api.resuming import find_run
from dstrain.planning.layout_names import LayoutChoice
from dstrain.runs.checkpoint.hold import held
from dstrain.runs.checkpoint.manifest import (
    damage_of,
    file_sizes,
    files_of,
    forget_damage,
    half_written,
    is_lasting,
    named_checkpoints,
    note_damage,
    of_another_run,
    read_manifest,
    run_id,
    unknown_files,
    wrong_files,
)
from dstrain.runs.run_folder import read_metrics

COMPLETE, DAMAGED, HALF_WRITTEN = "complete", "damaged", "half-written"

OnBytes = Callable[[Path, int, int], None]


@dataclass(frozen=True)
class CheckpointInfo:
    """One checkpoint of a run.

    Attributes:
        step: after which it was saved.
        path: its folder.
        bytes: of all its files.
        state: ``complete``, ``damaged`` or ``half-written``.
        why: what is damaged.
        layout: by its name, such as ``zero2-pp2-dp2``.
        loss: of its step.
        saved_at: in seconds since the epoch.
        versions: of the packages that wrote it.
        checksums: whether its manifest has them.
        unknown_files: that its manifest does not name.
    """

    step: int
    path: str
    bytes: int
    state: str
    why: str | None = None
    layout: str | None = None
    loss: float | None = None
    saved_at: float | None = None
    versions: dict[str, str] = field(default_factory=dict)
    checksums: bool = False
    unknown_files: list[str] = field(default_factory=list)


def checkpoints(
    run: str | PathLike[str],
    *,
    verify: bool = False,
    on_bytes: OnBytes = lambda path, read, total: None,
    events: Events = SILENT,
) -> list[CheckpointInfo]:
    """The checkpoints of a run, oldest first, and what was being written.

    Args:
        run: a run folder, or a run's name below ``runs/``.
        verify: read all bytes, and compare them with the checksums. What is found is noted in the checkpoint, which
            `resume` then passes over at once.
        on_bytes: with ``verify``, called with the checkpoint, the bytes read since the last call, and its total.
        events: told where no note could be left.

    Raises:
        DstrainError: there is no such run.
    """
    folder = find_run(run)
    own_id = run_id(folder.run_id, folder.checkpoints)
    losses = {record["step"]: record.get("loss") for record in read_metrics(folder.metrics)}
    found = []
    for path in named_checkpoints(folder.checkpoints):
        step = int(path.name.removeprefix("step-"))
        with ExitStack() as holding:
            with suppress(OSError):  # it has no manifest, or is gone
                holding.enter_context(held(path))
            info = replace(_sizes(path, step), loss=losses.get(step))
            # Bytes that are read now count more than what was found in them before.
            why = damage_of(path, noted=not verify)
            if why is None and verify:
                why = _verify(path, on_bytes, events)
            info = _with_manifest(info, path, own_id, why)
        if path.is_dir():  # one that a running training has removed meanwhile is no damaged one
            found.append(info)
    for path in half_written(folder.checkpoints):
        number = path.name.removeprefix(".step-").removesuffix(".partial")
        if number.isdigit():
            found.append(replace(_sizes(path, int(number)), state=HALF_WRITTEN))
    return found


def _sizes(folder: Path, step: int) -> CheckpointInfo:
    """What can be said of any folder, with or without a manifest."""
    size, saved_at = 0, None
    with suppress(OSError):
        size, saved_at = sum(file_sizes(folder).values()), folder.stat().st_mtime
    return CheckpointInfo(step, str(folder), size, COMPLETE, saved_at=saved_at)


def _with_manifest(info: CheckpointInfo, path: Path, own_id: str | None, why: str | None) -> CheckpointInfo:
    try:
        manifest = read_manifest(path)
        why = why or of_another_run(path, own_id)
        info = replace(
            info,
            layout=_layout(manifest.get("identity", {})),
            saved_at=manifest.get("saved_at", info.saved_at),
            versions=manifest.get("versions", {}),
            checksums=all(file.sha256 is not None for file in files_of(manifest).values()),
            unknown_files=unknown_files(path),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = why or f"its manifest can't be read ({error})"
    return info if why is None else replace(info, state=DAMAGED, why=why)


def _verify(path: Path, on_bytes: OnBytes, events: Events) -> str | None:
    """Read every byte; leave a note of what was found, for `resume`."""
    try:
        files = files_of(read_manifest(path))
    except (OSError, ValueError) as error:
        return f"its manifest can't be read ({error})"
    total = sum(file.size for file in files.values())
    wrong = wrong_files(path, files, sorted(files), on_bytes=lambda read: on_bytes(path, read, total))
    lasting = {name: reason for name, reason in wrong.items() if is_lasting(reason)}
    why = "; ".join((lasting or wrong)[name] for name in sorted(lasting or wrong)) or None
    try:
        if why is None:
            forget_damage(path)
        elif path.is_dir() and is_lasting(why):
            note_damage(path, why)
    except OSError as error:
        events.note(f"can't record the damage in {path}: {error.strerror}", "verify")
    return why


def _layout(identity: dict[str, Any]) -> str | None:
    """The layout by its name, as ``zero2-pp2-dp2``."""
    keys = ("zero", "pipeline", "data_parallel", "schedule", "offload")
    if any(key not in identity for key in keys):
        return None
    return LayoutChoice(**{key: identity[key] for key in keys}).name
