"""A dataset from outside through the command line: it trains what the same texts in a file train, in every layout."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Said
from tests.support.e2e import start

pytestmark = pytest.mark.timeout(400)

OWN_CODE = Path(__file__).parents[1] / "support" / "own_code" / "own_datasets.py"
CONFIG = """\
seq_len: 32
global_batch: 8
save_every: 3
sample_tokens: 0
validation: 0.2
lr_schedule: constant
"""
TWO_REPLICAS = ("--zero", "2", "--data-parallel", "2", "--micro-batch", "2")
TWO_STAGES = ("--zero", "1", "--pipeline", "2", "--data-parallel", "2", "--micro-batch", "2")


def records(place: Path, name: str) -> list[dict[str, Any]]:
    lines = (place / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def numbers(place: Path, name: str) -> list[tuple[Any, ...]]:
    keys = ("step", "loss", "grad_norm", "validation_loss")
    return [tuple(record.get(key) for key in keys) for record in records(place, name)]


def test_it_trains_as_files_do_and_goes_on_elsewhere_in_another_layout(
    place: Path,
    dstrain: Callable[..., Said],
    dstrain_here: Callable[..., Said],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (place / "configs").mkdir()
    texts = place / "text.jsonl"
    common = f"model: {place / 'model'}\n{CONFIG}"
    (place / "configs" / "files.yaml").write_text(f"{common}data: {texts}\n")
    options = json.dumps({"file": str(texts)})
    (place / "configs" / "code.yaml").write_text(
        f"{common}data: own_datasets:lines\ndata_options: {options}\n"
    )
    code, files = ("--config", "configs/code.yaml"), ("--config", "configs/files.yaml")
    missing = dstrain_here("plan", *code)
    assert missing.code == 2 and "there is no module 'own_datasets'" in missing.err, missing.err
    shutil.copy(OWN_CODE, place / "configs")
    planned = dstrain_here("plan", *code)
    assert planned.code == 0, planned.err
    assert "not covered by the equality proof: dataset own_datasets:lines" in planned.out

    for name, arguments in {
        "files": (*files, *TWO_REPLICAS, "--steps", "6"),
        "code": (*code, *TWO_REPLICAS, "--steps", "6"),
        "staged": (*code, *TWO_STAGES, "--steps", "3"),
    }.items():
        said = dstrain("run", *arguments, "--name", name)
        assert said.code == 0, said.out + said.err
    assert numbers(place, "code") == numbers(place, "files"), "to the bit"

    # From another folder, in another layout.
    (place / "elsewhere").mkdir()
    monkeypatch.chdir(place / "elsewhere")
    run = str(place / "runs" / "staged")
    more = ("--steps", "6", "--zero", "2", "--pipeline", "1", "--data-parallel", "2")
    changed = dstrain_here("resume", run, *more, "--set", "data_options.suffix=.", "--dry-run")
    assert changed.code == 2 and "data = " in changed.err and "but this run has" in changed.err, changed.err
    broken = dstrain_here("resume", run, *more, "--set", "data_options.suffix=1", "--dry-run")
    assert broken.code == 2 and "own_datasets:lines failed at document 1: TypeError" in broken.err, broken.err
    said = start(place / "elsewhere", os.environ, "resume", run, *more).said(200)
    assert said.code == 0, said.out + said.err
    staged, whole = records(place, "staged"), records(place, "code")
    assert [record["step"] for record in staged] == [record["step"] for record in whole]
    for one, other in zip(staged, whole, strict=True):
        for key in {"loss", "grad_norm", "validation_loss"} & other.keys():
            assert one[key] == pytest.approx(other[key], rel=1e-5), (one, other)

    monkeypatch.chdir(place)
    again = dstrain("reproduce", "code")
    assert again.code == 0 and "bit-equal" in again.out, again.out + again.err
