"""The ``checkpoints/`` folder: flushes and publishes finished checkpoints, and removes old ones."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import threading
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from dstrain.files import flush, make_folder
from dstrain.runs.checkpoint.hold import unless_held
from dstrain.runs.checkpoint.manifest import (
    MANIFEST,
    FileRecord,
    complete_checkpoints,
    files_of,
    make_manifest,
    missing_or_cut,
    read_manifest,
    unreadable,
)
from dstrain.strict_json import to_json
from dstrain.version import __version__


def begin(folder: Path, step: int, *, keep: int, keep_every: int, damaged: Collection[str]) -> Path:
    """Clear away what an earlier process left half done, and make the hidden folder of a new checkpoint.

    A process that ended between the name of a checkpoint and the removal of an old one left that one too.
    """
    make_folder(folder, below=folder.parent)
    prune(folder, keep=keep, keep_every=keep_every, damaged=damaged)
    aside = aside_of(folder, step)
    aside.mkdir()
    return aside


def aside_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is written before it has its name."""
    return folder / f".{named(folder, step).name}.partial"


def named(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}"


def write_manifest(
    aside: Path,
    *,
    step: int,
    run: str,
    identity: Mapping[str, Any],
    config: Mapping[str, Any],
    files: Mapping[str, FileRecord],
) -> None:
    """Name every file, in one that is on the disk when this returns.

    Raises:
        OSError: it could not be written, or a file is not what was said of it.
    """
    manifest = make_manifest(
        step=step,
        run=run,
        identity=identity,
        config=config,
        versions={
            "dstrain": __version__,
            "torch": torch.__version__,
            **{name: importlib.metadata.version(name) for name in ("deepspeed", "transformers")},
        },
        saved_at=time.time(),
        files=files,
    )
    with (aside / MANIFEST).open("w", encoding="utf-8") as file:
        file.write(to_json(manifest, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    flush_folders(aside)
    try:
        why = missing_or_cut(aside, files_of(read_manifest(aside)))
    except ValueError as error:
        why = unreadable(MANIFEST, error)
    if why is not None:
        raise OSError(f"the files on disk differ from what was written: {why}")


def give_name(aside: Path, final: Path) -> None:
    """One rename. A damaged checkpoint of the same step goes first, hidden until it is removed."""
    if final.exists():
        os.replace(final, _hidden(final))
    os.replace(aside, final)
    flush(final.parent)
    flush(final.parent.parent)


def prune(folder: Path, *, keep: int, keep_every: int, damaged: Collection[str]) -> None:
    """Remove all but the newest ``keep`` and those that are kept for good; a damaged one is left as it is, and so is
    one that somebody reads, until the next time."""
    complete = [path for path in complete_checkpoints(folder) if path.name not in damaged]
    for old in complete[:-keep]:
        if not (keep_every and int(old.name.removeprefix("step-")) % keep_every == 0):
            with unless_held(old) as free:
                if free:
                    os.replace(old, _hidden(old))
    _remove_leftovers(folder)


def _remove_leftovers(folder: Path) -> None:
    """What was being written or removed when a process ended."""
    for pattern in (".step-*.partial", ".step-*.removed"):
        for stale in folder.glob(pattern):
            shutil.rmtree(stale, ignore_errors=True)


def _hidden(checkpoint: Path) -> Path:
    """The name under which a checkpoint is removed, so that half of it is never taken for a damaged one."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.removed")
    shutil.rmtree(hidden, ignore_errors=True)
    return hidden


# As much as shows whether a disk takes anything at all.
_PROBE_BYTES = 1024 * 1024


def flush_folders(folder: Path) -> None:
    """Bring the folder's own entries to the disk, and those of the folders below it."""
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            flush(path)


def why_not_written(error: Exception, folder: Path) -> str | None:
    """The disk's own reason behind an error of writing below ``folder``; call it before anything is removed.

    None for an error that has nothing to do with writing: the connection to a rank that failed, for one.
    """
    if isinstance(error, OSError):
        return error.strerror or str(error)
    refusal = _refusal_of_disk(folder) if folder.is_dir() else None
    return refusal or (str(error).splitlines()[0] if _is_of_torch_writer(error) else None)


def _refusal_of_disk(folder: Path) -> str | None:
    """Why the disk takes no more, found by trying: torch's writer says only that it failed."""
    probe = folder / f"probe-{os.getpid()}-{threading.get_ident()}"
    try:
        with probe.open("wb") as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror
    finally:
        probe.unlink(missing_ok=True)
    return None


def _is_of_torch_writer(error: Exception) -> bool:
    """torch.save's C++ writer raises a RuntimeError for whatever the disk says."""
    return isinstance(error, RuntimeError) and any(
        word in str(error)
        for word in ("PytorchStreamWriter", "inline_container", "unexpected pos", "file write")
    )
