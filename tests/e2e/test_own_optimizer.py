"""An optimizer from outside through the command line: named in a config, trained in two layouts, resumed in a third."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Said

pytestmark = pytest.mark.timeout(300)

OWN_CODE = Path(__file__).parents[1] / "support" / "own_code" / "own_optimizers.py"
CONFIG = """\
model: model
data: text.jsonl
optimizer: own_optimizers:Momentum
optimizer_options:
  beta: 0.8
lr: 0.3
lr_schedule: constant
seq_len: 32
global_batch: 8
save_every: 3
sample_tokens: 0
validation: 0.2
"""


def records(place: Path, name: str) -> list[dict[str, Any]]:
    lines = (place / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["step"]]


def test_it_is_found_beside_the_config_trained_and_resumed(
    place: Path, dstrain: Callable[..., Said], dstrain_here: Callable[..., Said]
) -> None:
    (place / "configs").mkdir()
    (place / "configs" / "mine.yaml").write_text(CONFIG)
    config = ("--config", "configs/mine.yaml")
    missing = dstrain_here("plan", *config)
    assert missing.code == 2 and "there is no module 'own_optimizers'" in missing.err, missing.err
    shutil.copy(OWN_CODE, place / "configs")

    planned = dstrain_here("plan", *config)
    assert planned.code == 0, planned.err
    assert "not covered by the equality proof: optimizer own_optimizers:Momentum" in planned.out

    whole = dstrain("run", *config, "--zero", "0", "--steps", "6", "--name", "whole")
    assert whole.code == 0, whole.out + whole.err
    layout = ("--zero", "1", "--pipeline", "2", "--micro-batch", "2")
    short = dstrain("run", *config, *layout, "--steps", "3", "--name", "moved")
    assert short.code == 0, short.out + short.err

    elsewhere = ("--steps", "6", "--zero", "2", "--pipeline", "1", "--data-parallel", "2")
    other = dstrain_here("resume", "moved", *elsewhere, "--set", "optimizer_options.beta=0.5", "--dry-run")
    assert (
        other.code == 2 and "optimizer_options = {'beta': 0.8}, but this run has {'beta': 0.5}" in other.err
    )
    said = dstrain("resume", "moved", *elsewhere)
    assert said.code == 0, said.out + said.err
    moved, unbroken = records(place, "moved"), records(place, "whole")
    assert [record["step"] for record in moved] == [1, 2, 3, 4, 5, 6]
    for one, another in zip(moved, unbroken, strict=True):
        assert one["loss"] == pytest.approx(another["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(another["grad_norm"], rel=1e-5)
    assert moved[5]["loss"] < moved[0]["loss"] - 0.05, "it learns"

    broken = (place / "configs" / "own_optimizers.py").read_text().replace("def __init__", "def _init")
    (place / "configs" / "own_optimizers.py").write_text(broken)
    failed = dstrain("run", *config, "--zero", "0", "--steps", "6", "--name", "broken")
    assert failed.code == 1 and "optimizer own_optimizers:Momentum can't be made" in failed.err, failed.err
