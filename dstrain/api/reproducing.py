"""``reproduce``: repeats a run, and compares it step by step, bit by bit."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from dstrain.api.events import SILENT, Events
from dstrain.api.hub_data import planned_commits
from dstrain.api.planning import plan_for
from dstrain.api.preflight import new_run_folder, not_writable
from dstrain.api.received import check_received, note_other_owners
from dstrain.api.resuming import find_run
from dstrain.api.running import Job, execute
from dstrain.config.data_sources import with_paths
from dstrain.config.loader import ResolvedConfig, override, read_config, replace_values
from dstrain.config.origins import Origin
from dstrain.data.chat.options import CHATML
from dstrain.data.token_files.kinds import named_by_its_prefix
from dstrain.data.tokenizing.tokenizer_files import BYTES
from dstrain.errors import DstrainError
from dstrain.files import write_json
from dstrain.planning.partition import partition_of
from dstrain.plugins import is_code
from dstrain.report.comparison import Deviation, Repetition, compare_bits
from dstrain.runs.record.differences import Difference, differences
from dstrain.runs.record.record import first_launch, read_launches
from dstrain.runs.run_folder import RunFolder, last_step


@dataclass(frozen=True)
class ReproduceResult:
    """A run and its repetition.

    Attributes:
        run, again: the two run folders.
        repetition: how far both got, and the first number that differs.
        differences: what was recorded of ``run`` that is another now, what most likely changes numbers first.
        cause: why the numbers differ, as far as it was recorded; None where they don't.
        stopped: why the repetition did not come to its end; None where it did.
    """

    run: Path
    again: Path
    repetition: Repetition
    differences: tuple[Difference, ...]
    cause: str | None = None
    stopped: DstrainError | None = None

    @property
    def equal(self) -> bool:
        """Whether every number that both have is the same, to the bit."""
        return self.repetition.deviation is None

    @property
    def deviation(self) -> Deviation | None:
        """The first number that differs."""
        return self.repetition.deviation


def reproduce(
    run: str | PathLike[str],
    *,
    changes: Mapping[str, Any] | None = None,
    settings: Sequence[str] = (),
    trust: bool = False,
    events: Events = SILENT,
) -> ReproduceResult:
    """Train ``run`` again beside it, and compare every step.

    Args:
        run: a run folder, or a run's name below ``runs/``.
        changes: config keys that change on purpose, such as ``{"seed": 5}``.
        settings: the same as ``KEY=VALUE`` strings.
        trust: import the code that the run's config names, though the run folder belongs to another user.
        events: told of the repetition.

    Raises:
        DstrainError: the run has no record to be repeated from, or the repetition is refused, or fails before it has
            trained a step.
    """
    folder = find_run(run)
    launches = read_launches(folder)
    first = first_launch(launches, folder)
    if last_step(folder.metrics) == 0:
        raise DstrainError(
            "the run has not trained a step, so there is nothing to compare with",
            where=str(folder.metrics),
            hint=f"`dstrain resume {folder.name}` trains it; or restore the file, if it had steps",
        )
    try:
        resolved = choices_again(folder, first, changes or {}, settings)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise _damaged(folder) from error
    check_received(folder, resolved, [folder.config, folder.launches], trust=trust, events=events)
    note_other_owners(resolved, events)
    again = new_run_folder(resolved, resume=False)
    planned = plan_for(resolved, events=events, commits=planned_commits(folder))
    events.planned(planned.plan)
    events.note(f"repeating {folder.name} as {again.name}: {planned.plan.batch.describe()}", "reproduce")
    stopped: DstrainError | None = None
    try:
        result = execute(Job(resolved, planned, again, new=True), events)
        if not result.completed:
            stopped = DstrainError(f"stopped after step {result.step}", exit_code=result.exit_code)
    except DstrainError as error:  # what it has trained is compared all the same
        stopped = error
    if stopped is not None and last_step(again.metrics) == 0:
        raise stopped
    found = differences(first, first_launch(read_launches(again), again))
    repetition = compare_bits(folder, again)
    record = {"of": folder.name, **repetition.to_record(), "differences": [str(one) for one in found]}
    try:
        write_json(again.reproduction, record)
    except OSError as error:
        raise not_writable(error, again) from error
    deviation = repetition.deviation
    why = None if deviation is None else _cause(deviation.step, launches, first, found)
    return ReproduceResult(folder.path, again.path, repetition, tuple(found), why, stopped)


def recorded_image(folder: RunFolder) -> tuple[str | None, Mapping[str, Any]]:
    """The container image that a run was made in (None: in none), and the config of its first launch.

    Raises:
        DstrainError: it has no record.
    """
    first = first_launch(read_launches(folder), folder)
    image, config = first.get("image"), first.get("config")
    if not isinstance(image, str | None) or not isinstance(config, dict):
        raise _damaged(folder)
    return image, config


def _damaged(folder: RunFolder) -> DstrainError:
    return DstrainError(
        "the record of its first launch is damaged",
        where=str(folder.launches),
        hint="restore the file from a copy; without it nobody knows what was trained",
    )


def _cause(
    step: int, launches: Sequence[Mapping[str, Any]], first: Mapping[str, Any], found: Sequence[Difference]
) -> str:
    """Why the two differ from this step on, as far as it was recorded.

    Args:
        launches: all of the run that was repeated.
        found: what is another now than in its ``first`` one.
    """
    since = launches[launches.index(first) :]
    trained = [launch for launch in since if launch["first_step"] <= max(step, 1)][-1]
    if "config" in trained:
        meanwhile = differences(first, trained)
        if meanwhile:
            since_then = f"; differences now: {_in_short(found)}" if found else ""
            return (
                f"the run itself changed at step {trained['first_step']}: {_in_short(meanwhile)}{since_then}"
            )
    if found:
        return f"differences from the original run: {_in_short(found)}"
    unknown = "no recorded condition differs: a kernel that does not add in a fixed order"
    if first["config"]["deterministic"]:
        return unknown
    return f"{unknown}; runs with --deterministic can be repeated bit by bit"


def _in_short(found: Sequence[Difference]) -> str:
    return "; ".join(str(difference) for difference in found[:3])


PATHS = ("model", "data", "tokenizer", "chat_template", "ds_config", "hostfile")
"""Choices that may be paths."""
_NO_PATHS = ("stdlib", "auto", BYTES, CHATML)  # but these, whatever lies under such a name

# Where a run's machines are, when somebody typed dstrain on each of them.
_PLACES = ("launcher", "nodes", "processes", "master_addr", "master_port")
# What follows from other choices, and must be chosen anew where those are changed on purpose.
_REPLICAS_FOLLOW = {"pipeline"}
_CUT_FOLLOWS = {"model", "pipeline", "schedule", "partition"}
_MICRO_BATCH_FOLLOWS = {"pipeline", "data_parallel", "global_batch", "micro_batch"}


def choices_again(
    folder: RunFolder, first: Mapping[str, Any], flags: Mapping[str, Any], settings: Sequence[str]
) -> ResolvedConfig:
    """The run's own choices, those that followed from its machines included, under another name.

    A run that was resumed has the choices of its last launch in its config, and not those of ``first``, the record of
    the launch that began it.

    Args:
        flags, settings: what is changed on purpose.

    Raises:
        DstrainError: a choice that can't be.
    """
    changed = changed_keys(flags, settings)
    values = dict(first["config"])
    values |= {"runs_dir": str(folder.path.parent), "name": _free_name(folder), "time_limit": None}
    if not changed & _REPLICAS_FOLLOW:
        values["data_parallel"] = first["layout"]["data_parallel"]
    if not changed & _MICRO_BATCH_FOLLOWS:
        values["micro_batch"] = first["batch"]["micro_batch"]
    if not changed & _CUT_FOLLOWS:
        values["partition"] = partition_of(first["layout"]["cut"])
    if values["launcher"] == "none":
        values |= dict.fromkeys(_PLACES)
    values |= _paths(values, folder, first)
    base = replace_values(read_config(folder.config), values, Origin("file", str(folder.launches)))
    return override(base, flags, settings)


def changed_keys(flags: Mapping[str, Any], settings: Sequence[str]) -> set[str]:
    """The run-config keys that flags and ``--set`` name."""
    return flags.keys() | {setting.partition("=")[0] for setting in settings}


def _paths(values: Mapping[str, Any], folder: RunFolder, first: Mapping[str, Any]) -> dict[str, Any]:
    """Paths that count from the folder that the run was started from, and what the run folder keeps of what is gone."""
    directory = Path(first["directory"])
    given = {
        key: Path(values[key]).expanduser()
        for key in PATHS
        if isinstance(values.get(key), str) and values[key] not in _NO_PATHS
    }
    if isinstance(values["data"], str) and is_code(values["data"]):
        del given["data"]
    if first["model"]["folder"] is None:
        del given["model"]  # a shape that comes with dstrain
    elsewhere = directory != Path.cwd()
    found: dict[str, Any] = {
        key: there
        for key, path in given.items()
        if elsewhere and key != "data" and (there := _from(directory, str(path))) != str(path)
    }
    gone = {key for key, path in given.items() if not Path(found.get(key, path)).exists()}
    was_folder = "model" in given and first["model"]["folder"] == str(directory / given["model"])
    if was_folder and values["init"] == "random" and "model" in gone:
        found["model"] = str(folder.model)
    if "tokenizer" in gone:
        found["tokenizer"] = str(folder.model)
    for key in ("data", "validation"):
        if elsewhere and isinstance(values.get(key), str | list):
            found[key] = with_paths(values[key], lambda path: _from(directory, path))
    return found


def _from(directory: Path, path: str) -> str:
    """A path, a pattern or the first part of Megatron's two names, where it counts from that folder and is there."""
    relative = Path(path).expanduser()
    there = directory / relative
    if path in _NO_PATHS or is_code(path) or relative.is_absolute():
        return path
    if named_by_its_prefix(there).exists():
        return str(there)
    pattern = str(Path(glob.escape(str(directory))) / relative)
    return pattern if glob.has_magic(path) and any(glob.iglob(pattern, recursive=True)) else path


def _free_name(folder: RunFolder) -> str:
    names = (f"{folder.name}-again{f'-{number}' if number > 1 else ''}" for number in range(1, 10_000))
    return next(name for name in names if not (folder.path.parent / name).exists())
