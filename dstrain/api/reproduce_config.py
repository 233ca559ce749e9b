"""The config with which a run is repeated: that of the launch that trained its first steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dstrain.config.loader import ResolvedConfig, override, read_config, replace_values
from dstrain.config.origins import Origin
from dstrain.data.tokenizer_files import BYTES
from dstrain.planning.partition import partition_of
from dstrain.plugins import is_code
from dstrain.runs.run_folder import RunFolder

PATHS = ("model", "data", "tokenizer", "ds_config", "hostfile")
"""Choices that may be paths."""
_NO_PATHS = ("stdlib", "auto", BYTES)  # but these, whatever lies under such a name

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


def _paths(values: Mapping[str, Any], folder: RunFolder, first: Mapping[str, Any]) -> dict[str, str]:
    """Paths that count from the folder that the run was started from, and what the run folder keeps of what is gone."""
    directory = Path(first["directory"])
    given = {key: Path(values[key]).expanduser() for key in PATHS if values[key] not in (None, *_NO_PATHS)}
    if is_code(values["data"]):
        del given["data"]
    if first["model"]["folder"] is None:
        del given["model"]  # a shape that comes with dstrain
    found = {
        key: str(directory / path)
        for key, path in given.items()
        if directory != Path.cwd() and not path.is_absolute() and (directory / path).exists()
    }
    gone = {key for key, path in given.items() if not Path(found.get(key, path)).exists()}
    was_folder = "model" in given and first["model"]["folder"] == str(directory / given["model"])
    if was_folder and values["init"] == "random" and "model" in gone:
        found["model"] = str(folder.model)
    if "tokenizer" in gone:
        found["tokenizer"] = str(folder.model)
    return found


def _free_name(folder: RunFolder) -> str:
    names = (f"{folder.name}-again{f'-{number}' if number > 1 else ''}" for number in range(1, 10_000))
    return next(name for name in names if not (folder.path.parent / name).exists())
