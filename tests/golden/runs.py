"""The small run that the golden tests train, and what is kept of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.golden.commands import DATA, Said
from tests.golden.compare import key_paths, renamed
from tests.golden.processor import same_numbers

LOSSES = DATA / "losses.json"
RUN_FOLDER = DATA / "run_folder.json"

LAYOUTS = {
    "one-process": "--zero 0 --pipeline 1 --data-parallel 1",
    "zero-2-pipeline-2": "--zero 2 --pipeline 2 --data-parallel 1",
    "zero-1-data-parallel-2": "--zero 1 --pipeline 1 --data-parallel 2",
}
IN_DETAIL = "zero-2-pipeline-2"
"""The layout whose run folder is looked into."""

NUMBERS = ("step", "loss", "grad_norm", "lr", "tokens", "held_out_loss")
"""What metrics.jsonl says of the training itself; the rest is time and memory."""

# Below these stand names of packages and variables, what git says, and DeepSpeed's keys, which other tests keep.
_OPAQUE = ("deepspeed", "files", "packages", "source", "variables", "versions")


def train(layout: str, place: Path, dstrain: Callable[..., Said], *arguments: str) -> Path:
    """Train the run of ``train.yaml`` in this layout; its run folder."""
    said = dstrain("run", "--config", "train.yaml", *LAYOUTS[layout].split(), "--name", layout, *arguments)
    assert said.code == 0, said
    return place / "runs" / layout


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl: another may be written right now."""
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def losses_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without times and memory; those of 0.1 and today's under the names of today."""
    names = {renamed(key) for key in NUMBERS}
    lines = [{renamed(key): value for key, value in line.items()} for line in metrics_of(folder)]
    return [{key: value for key, value in line.items() if key in names} for line in lines]


def run_folder_of(folder: Path) -> dict[str, Any]:
    """The names of a run folder's files, and the keys of those that others read."""
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    launches = [json.loads(line) for line in (folder / "launches.jsonl").read_text().splitlines()]
    manifests = sorted(folder.glob("checkpoints/*/manifest.json"))
    return {
        "files": files,
        "metrics.jsonl": [sorted(line) for line in metrics_of(folder)],
        "launches.jsonl": [key_paths(line, opaque=_OPAQUE) for line in launches],
        "result.json": _keys(folder / "result.json"),
        "record.json": _keys(folder / "record.json"),
        "manifest.json": [_keys(manifest) for manifest in manifests],
        "status.json": _keys(folder / "logs" / "rank-0.status.json"),
    }


def _keys(path: Path) -> list[str]:
    return key_paths(json.loads(path.read_text(encoding="utf-8")), opaque=_OPAQUE)


def number_differences(
    stored: list[dict[str, Any]], now: list[dict[str, Any]], tolerance: float
) -> list[str]:
    """What two runs' lines of `losses_of` differ in by more than a relative ``tolerance``; 0: by a bit."""
    found = [f"{len(stored)} lines and {len(now)}"] if len(stored) != len(now) else []
    for was, line in zip(stored, now, strict=False):
        old = {renamed(key): value for key, value in was.items()}
        step = f"step {was['step']}"
        if old.keys() != line.keys():
            found.append(f"{step}: {sorted(old)} and {sorted(line)}")
        found += [
            f"{step}: {key} was {old[key]!r} and is {line[key]!r}"
            for key in old.keys() & line.keys()
            if not same_numbers(old[key], line[key], tolerance)
        ]
    return found
