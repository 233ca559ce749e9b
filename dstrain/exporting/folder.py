"""An exported folder: it appears whole or not at all, and its configurations speak of its own files alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from dstrain.data.tokenizing.tokenizer_files import speaks_of_other_files
from dstrain.errors import DstrainError, way_out
from dstrain.exporting.writing import ExportedTensors, refuse_full_disk


@contextmanager
def written_aside(out: Path, aside: Path, needed: int) -> Iterator[None]:
    """``out`` is written in ``aside``, a new folder, and gets its name at the end; whatever fails, nothing is left.

    Args:
        needed: bytes of its weights.

    Raises:
        DstrainError: the disk is full, or does not take it.
    """
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        refuse_full_disk(out.parent, needed)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
    try:
        yield
        with writing(out):
            aside.replace(out)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """What the disk refuses becomes a message with its place and reason."""
    try:
        yield
    except OSError as error:
        what = f" ({error.filename})" if error.filename else ""
        raise DstrainError(
            f"this folder can't be written: {error.strerror or error}{what}",
            where=str(out),
            hint=way_out(error, "name a folder that can be created"),
        ) from error


def describe(config: PretrainedConfig, tensors: ExportedTensors) -> None:
    """Let a model's configuration speak of these weights, and of no files that are not there."""
    config.architectures = [tensors.architecture]
    config.dtype = str(tensors.dtype).removeprefix("torch.")
    for name in [name for name in vars(config) if speaks_of_other_files(name) and name[:1] != "_"]:
        delattr(config, name)  # transformers leaves its own `_name_or_path` out by itself


def own_generation_config(path: Path) -> dict[str, Any] | None:
    """What lies beside a model's config, likewise; None where nothing readable does."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return (
        {name: value for name, value in found.items() if not speaks_of_other_files(name)} if found else None
    )
