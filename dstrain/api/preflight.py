"""Checks before anything is started: the run folder, and what would make the run fail."""

from __future__ import annotations

import itertools
import shutil
import time
from contextlib import suppress
from pathlib import Path

from dstrain.api.events import Events
from dstrain.config.loader import ResolvedConfig
from dstrain.config.text_file import shown
from dstrain.errors import DstrainError
from dstrain.estimate.disk import check_disk
from dstrain.launch.placement import Placement
from dstrain.planning.plan import Plan
from dstrain.runs.checkpoint.identity import refuse_other, what_changes
from dstrain.runs.checkpoint.manifest import newest_complete
from dstrain.runs.received import refuse_links
from dstrain.runs.run_folder import Access, RunFolder, make_new


def new_run_folder(resolved: ResolvedConfig, *, resume: bool) -> RunFolder:
    """The folder of this run, not made yet (`claim`).

    Raises:
        DstrainError: there is one and it is not resumed, or there are links in it.
    """
    config = resolved.config
    name = config.name
    if name is None:
        model = Path(config.model).name or "model"
        name = f"{time.strftime('%Y-%m-%d-%H%M%S')}-{model}"
    elif (
        not name
        or Path(name).name != name
        or name.startswith(".")
        or not name.isprintable()
        or len(name) > 100
    ):
        raise DstrainError(
            f"{name!r} is not a valid folder name",
            where=str(resolved.origin("name")),
            hint="use up to 100 letters and digits, no slash and no leading dot; --set runs_dir=FOLDER"
            " sets the location",
        )
    _refuse_no_folder(Path(config.runs_dir), str(resolved.origin("runs_dir")))
    folder = RunFolder(Path(config.runs_dir) / name)
    if config.name is not None and folder.path.exists() and not resume:
        raise _exists(folder, resolved)
    if config.name is not None and folder.path.is_dir():
        refuse_links(folder)
    return folder


def claim(folder: RunFolder, resolved: ResolvedConfig) -> RunFolder:
    """Make the folder of a new run, which another command may have made since `new_run_folder`.

    One without a name of the user's gets a number then.

    Raises:
        DstrainError: it is there already, or can't be made.
    """
    try:
        if resolved.config.name is None:
            return RunFolder(make_numbered(folder.path, resolved.config.access), folder.node)
        make_new(folder.path, resolved.config.access)
    except OSError as error:
        if isinstance(error, FileExistsError) and folder.path.exists():
            raise _exists(folder, resolved) from None
        raise not_writable(error, folder) from error
    return folder


def make_numbered(path: Path, access: Access) -> Path:
    """Make a folder that nobody else has made: ``path``, or the first of ``path-2``, ``path-3``, ... Raises OSError."""
    for number in itertools.count(1):
        own = path if number == 1 else path.with_name(f"{path.name}-{number}")
        with suppress(FileExistsError):
            make_new(own, access)
            return own
    raise AssertionError("numbers end")


def _exists(folder: RunFolder, resolved: ResolvedConfig) -> DstrainError:
    return DstrainError(
        f"the run folder {folder.path} already exists",
        where=str(resolved.origin("name")),
        hint=f"choose another --name, or continue it with `dstrain resume {folder.name}`",
    )


def _refuse_no_folder(runs: Path, where: str) -> None:
    """Refuse a place for run folders that is none and can't become one. Raises DstrainError."""
    hint = "choose another folder with --set runs_dir=FOLDER"
    try:
        whole = runs.absolute()
    except FileNotFoundError:
        raise DstrainError(
            f"{shown(runs)} can't be created: the current folder has been removed",
            where=where,
            hint="change to another",
        ) from None
    try:
        above = next(path for path in (whole, *whole.parents) if path.exists())
    except OSError as error:  # a name that is too long
        raise DstrainError(
            f"{shown(runs)} can't be created: {error.strerror}", where=where, hint=hint
        ) from None
    if not above.is_dir():
        raise DstrainError(f"{shown(above)} is a file, not a folder", where=where, hint=hint)


def refuse_other_training(plan: Plan, folder: RunFolder, events: Events) -> None:
    """Refuse a folder with the checkpoint of another training, and say what changes. Raises DstrainError."""
    newest = newest_complete(folder.checkpoints)
    if newest is None:
        return
    refuse_other(newest, plan.identity)
    for line in what_changes(newest, plan.identity):
        events.note(line, "resume")


def refuse_elastic_alone(placement: Placement, resolved: ResolvedConfig) -> None:
    """Raises DstrainError where a run is to leave hosts out, and has none to leave out or can't ask them."""
    if not resolved.config.elastic or (
        len(placement.hosts) > 1 and placement.launcher not in ("slurm", "none")
    ):
        return
    raise DstrainError(
        "--elastic requires a hostfile with several hosts: it drops hosts that no longer answer over ssh",
        where=str(resolved.origin("elastic")),
        hint="add a --hostfile with all hosts; Slurm and Kubernetes replace lost hosts themselves",
    )


def refuse_full_disk(plan: Plan, folder: RunFolder) -> None:
    """Refuse a run whose checkpoints do not fit on its disk. Raises DstrainError."""
    there = next(path for path in (folder.path, *folder.path.parents) if path.exists())
    held = sum(path.stat().st_size for path in folder.checkpoints.rglob("*") if path.is_file())
    check_disk(
        needed=plan.disk_bytes,
        one=plan.checkpoint_bytes,
        free=shutil.disk_usage(there).free,
        held=held,
        where=str(folder.path),
    )


def not_writable(error: OSError, folder: RunFolder) -> DstrainError:
    """For an OSError of a file in the run folder."""
    return DstrainError(
        f"the run folder can't be written: {error.strerror}",
        where=str(error.filename or folder.path),
        hint="choose another folder with --set runs_dir=FOLDER",
    )


def node_of(resolved: ResolvedConfig, node_rank: int | None) -> int | None:
    """The number of this node, or None where none was given.

    Raises:
        DstrainError: the launcher has no use for it, there are fewer nodes, or each would name the run by itself.
    """
    config = resolved.config
    if config.launcher == "none" and config.name is None:
        raise DstrainError(
            "all nodes must use the same run name", where="--launcher none", hint="--name NAME"
        )
    if node_rank is None:
        return None
    if config.launcher != "none":
        raise DstrainError(
            "--node-rank is only for --launcher none, where you start dstrain on every node",
            where="--node-rank",
            hint="remove it, or add --launcher none --nodes N",
        )
    nodes = config.nodes or 1
    if node_rank >= nodes:
        raise DstrainError(
            f"there is no node {node_rank} among {nodes}",
            where="--node-rank",
            hint="nodes are counted from 0; --nodes N sets their number",
        )
    return node_rank
