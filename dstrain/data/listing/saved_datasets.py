"""Folders that ``datasets.save_to_disk`` has written: which of their files hold the data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dstrain.errors import DstrainError, way_out

DATASET_DICT = "dataset_dict.json"
_STATE = "state.json"


def saved_files(folder: Path, split: str | None) -> list[Path] | None:
    """The Arrow files of a saved data set, in its order; None where the folder is none.

    Args:
        split: which of several; None where there is only one.

    Raises:
        DstrainError: it is not whole, there is no such split, or several of which none was named.
    """
    if (folder / DATASET_DICT).is_file():
        splits = _read(folder / DATASET_DICT).get("splits")
        if not isinstance(splits, list) or not splits or not all(isinstance(name, str) for name in splits):
            raise DstrainError(
                "this file names no splits", hint="save the data set again", where=str(folder / DATASET_DICT)
            )
        folder = folder / _chosen(folder, splits, split)
        if not (folder / _STATE).is_file():
            raise DstrainError(
                f"this split of a saved data set has no {_STATE}",
                hint="copy it again, or save the data set again",
                where=str(folder),
            )
    elif not ((folder / _STATE).is_file() and (folder / "dataset_info.json").is_file()):
        return None
    return _shards(folder)


def _chosen(folder: Path, splits: list[str], split: str | None) -> str:
    if split is None and len(splits) == 1:
        return splits[0]
    if split in splits and split is not None:
        return split
    listed = ", ".join(splits)
    if split is None:
        raise DstrainError(
            f"this saved data set has several splits: {listed}",
            hint=f"name the folder of one: {folder / splits[0]}; or say which with split",
            where=str(folder),
        )
    raise DstrainError(
        f"this saved data set has no split {split!r}", hint=f"its splits are: {listed}", where=str(folder)
    )


def _shards(folder: Path) -> list[Path]:
    state = folder / _STATE
    listed = _read(state).get("_data_files")
    names = [one.get("filename") if isinstance(one, dict) else None for one in listed or []]
    # Only names: nothing outside of the folder is read because a file in it says so.
    if not isinstance(listed, list) or any(
        not isinstance(name, str) or Path(name).name != name for name in names
    ):
        raise DstrainError(
            "this file does not name the files of a saved data set",
            hint="save the data set again",
            where=str(state),
        )
    if _read(state).get("_indices_data_files"):
        raise DstrainError(
            "this data set was saved with a list of rows beside it, by an old version of datasets",
            hint="load it and save it again: its rows are then written in their order",
            where=str(folder),
        )
    paths = [folder / str(name) for name in names]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise DstrainError(
            f"this saved data set is not whole: {len(missing)} of its {len(paths)} files are missing, the first is"
            f" {missing[0].name}",
            hint="copy it again",
            where=str(folder),
        )
    return paths


def _read(path: Path) -> dict[str, Any]:
    hint = "copy it again, or save the data set again"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DstrainError(
            f"can't be read: {error.strerror or error}", where=str(path), hint=way_out(error)
        ) from error
    except (ValueError, RecursionError) as error:
        raise DstrainError(f"this is not JSON: {error}", hint=hint, where=str(path)) from None
    if not isinstance(found, dict):
        raise DstrainError("this is not a JSON object", hint=hint, where=str(path))
    return found
