"""``resume``: resumes a run from its newest complete checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import Any

from dstrain.addresses import refuse_address
from dstrain.api.events import SILENT, Events
from dstrain.api.hub_data import planned_commits
from dstrain.api.outcome import RunResult
from dstrain.api.planning import plan_for
from dstrain.api.preflight import node_of
from dstrain.api.received import check_received, note_other_owners
from dstrain.api.running import Job, execute
from dstrain.config.data_sources import steps_of_phases, weights_by_phase
from dstrain.config.loader import ResolvedConfig, override, read_config, replace_values
from dstrain.config.origins import Origin
from dstrain.config.text_file import shown
from dstrain.errors import DstrainError
from dstrain.runs.checkpoint.identity import refuse_other_batch
from dstrain.runs.checkpoint.manifest import choose_newest, newest_complete, run_id, step_of
from dstrain.runs.received import refuse_links
from dstrain.runs.run_folder import RunFolder, last_step


def resume(
    run: str | PathLike[str],
    *,
    changes: Mapping[str, Any] | None = None,
    node_rank: int | None = None,
    trust: bool = False,
    events: Events = SILENT,
) -> RunResult:
    """Go on with a run from its newest complete checkpoint; at the same layout, with the same bits.

    Args:
        run: a run folder, or a run's name below ``runs/``.
        changes: config keys that change, such as ``{"steps": 200}`` to train longer, or ``{"zero": 3, "pipeline": 1}``
            to continue in another layout.
        node_rank: as in `run`.
        trust: import the code that the run's config names, though the run folder belongs to another user.
        events: told of what happens.

    Returns:
        How the run ended; at once where all of its steps are trained already.

    Raises:
        RunFailedError: the first rank that failed, its host and its reason.
        DstrainError: there is no such run, what would change makes it another training, there are links in its folder,
            or it belongs to another user and names code.
    """
    folder = find_run(run)
    job = resumed_job(folder, changes or {}, node_rank=node_rank, trust=trust, events=events)
    if job is None:
        checkpoint = newest_complete(folder.checkpoints)
        return RunResult(folder.path, last_step(folder.metrics), True, checkpoint is not None, checkpoint)
    return execute(job, events)


def resumed_job(
    folder: RunFolder,
    flags: Mapping[str, Any],
    settings: Sequence[str] = (),
    *,
    node_rank: int | None = None,
    trust: bool = False,
    events: Events = SILENT,
) -> Job | None:
    """What goes on with a run; None where all of its steps are trained.

    Args:
        flags, settings: what changes in its config.
        trust: as in `resume`.

    Raises:
        DstrainError: it can't be resumed so.
    """
    if flags.get("name") is not None:
        raise DstrainError("a run can't be renamed when it is resumed", where="--name", hint="remove --name")
    before = read_config(folder.config)
    resolved = _with_the_phases_of(before, override(before, flags, settings), events)
    check_received(folder, resolved, [folder.config], trust=trust, events=events)
    node = node_of(resolved, node_rank)
    newest = choose_newest(folder.checkpoints, run_id(folder.run_id, folder.checkpoints)).checkpoint
    trained = step_of(newest) if newest else 0 if resolved.config.saves else last_step(folder.metrics)
    if folder.result.exists() and trained >= resolved.config.steps:
        events.note(
            f"{folder.name} has finished its {resolved.config.steps} steps; --steps N with a larger N continues",
            "resume",
        )
        return None
    if newest is None:
        events.note(f"{folder.name} has no complete checkpoint yet, and starts from step 1", "resume")
    else:
        events.note(f"{folder.name} continues from {newest.name}", "resume")
        config = resolved.config
        refuse_other_batch(newest, global_batch=config.global_batch, data_parallel=config.data_parallel)
    note_other_owners(resolved, events)
    planned = plan_for(resolved, events=events, commits=planned_commits(folder))
    events.planned(planned.plan)
    return Job(resolved, planned, RunFolder(folder.path, node or 0), node)


def _with_the_phases_of(before: ResolvedConfig, resolved: ResolvedConfig, events: Events) -> ResolvedConfig:
    """The config with phases that end at the steps where they ended before, whatever the number of steps is now."""
    old, new = before.config, resolved.config
    if not old.data_phases or old.steps == new.steps or old.data_phases != new.data_phases:
        return resolved
    ends = steps_of_phases(weights_by_phase(old.sources, old.data_phases), old.steps)
    phases = [
        {**phase.model_dump(), "until": None if phase.until is None else end}
        for phase, end in zip(old.data_phases, ends, strict=True)
    ]
    if [phase["until"] for phase in phases] == [phase.until for phase in old.data_phases]:
        return resolved
    told = ", ".join(f"step {end:,}" for end in ends[:-1])
    events.note(f"phases of the data end where they did: after {told}", "resume")
    return replace_values(resolved, {"data_phases": phases}, Origin("derived", "the run so far"))


def find_run(run: str | PathLike[str]) -> RunFolder:
    """The run folder that ``run`` means: a path, or a name below ``runs/``.

    Raises:
        DstrainError: there is none, or what bears one of its names is a link, or no file.
    """
    name = str(run)
    with suppress(OSError):  # a name that no folder can have
        for path in (Path(name), Path("runs") / name):
            if (path / "config.yaml").is_file():
                folder = RunFolder(path)
                refuse_links(folder)
                return folder
    refuse_address(name, "RUN")
    known = sorted(path.parent.name for path in Path("runs").glob("*/config.yaml"))
    hint = f"run folders in runs/: {', '.join(known[-8:])}" if known else "`dstrain run` creates one"
    raise DstrainError(f"{shown(name)!r} is not a run folder (it has no config.yaml)", where="RUN", hint=hint)
