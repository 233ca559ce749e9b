"""A loss and a schedule from outside through the command line: planned, trained, resumed, repeated, compared."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Said

pytestmark = pytest.mark.timeout(400)

OWN_CODE = Path(__file__).parents[1] / "support" / "own_code"
CONFIG = """\
model: model
data: text.jsonl
loss: own_losses:smoothed
loss_options: {smoothing: 0.2}
lr_schedule: own_schedules:wsd
lr_schedule_options: {decay: 0.5, last: 6}
lr: 0.005
seq_len: 32
global_batch: 8
save_every: 3
sample_tokens: 0
validation: 0.2
eval_samples: 8
"""
NOT_COVERED = (
    "not covered by the equality proof: loss own_losses:smoothed, learning-rate schedule own_schedules:wsd"
)


def records(place: Path, name: str) -> list[dict[str, Any]]:
    lines = (place / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_they_are_planned_trained_resumed_repeated_and_verified(
    place: Path, dstrain: Callable[..., Said], dstrain_here: Callable[..., Said]
) -> None:
    (place / "mine.yaml").write_text(CONFIG)
    for file in ("own_losses.py", "own_schedules.py"):
        shutil.copy(OWN_CODE / file, place)
    config = ("--config", "mine.yaml")
    planned = dstrain_here("plan", *config)
    assert planned.code == 0, planned.err
    assert NOT_COVERED in " ".join(planned.out.split()), planned.out
    for words in ("{'smoothing': 0.2}", "{'decay': 0.5, 'last': 6}", "estimated as F.cross_entropy"):
        assert words in planned.out

    whole = dstrain("run", *config, "--zero", "0", "--steps", "6", "--name", "whole")
    assert whole.code == 0, whole.out + whole.err
    layout = ("--zero", "1", "--pipeline", "2", "--micro-batch", "2")
    short = dstrain("run", *config, *layout, "--steps", "3", "--name", "moved")
    assert short.code == 0, short.out + short.err
    elsewhere = ("--steps", "6", "--zero", "2", "--pipeline", "1", "--data-parallel", "2")
    other = dstrain_here("resume", "moved", *elsewhere, "--loss", "cross-entropy", "--set", "loss_options={}")
    assert other.code == 2 and "loss = own_losses:smoothed, but this run has built-in" in other.err, other.err
    said = dstrain("resume", "moved", *elsewhere)
    assert said.code == 0, said.out + said.err
    moved, unbroken = records(place, "moved"), records(place, "whole")
    assert moved[0]["validation_loss"] == pytest.approx(unbroken[0]["validation_loss"], rel=1e-5)
    for step, (one, another) in enumerate(zip(moved[1:], unbroken[1:], strict=True), start=1):
        assert one["step"] == another["step"] == step
        assert one["loss"] == pytest.approx(another["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(another["grad_norm"], rel=1e-5)
        assert one["lr"] == another["lr"] == 0.005 * min(1.0, (6 - step + 1) / 3)
    assert moved[6]["loss"] < moved[1]["loss"] - 0.05, "it learns"

    again = dstrain("reproduce", "whole")
    assert again.code == 0 and "bit-equal: all 6 steps of whole" in again.out, again.out + again.err


def test_verify_compares_layouts_with_them(place: Path, dstrain: Callable[..., Said]) -> None:
    (place / "mine.yaml").write_text(CONFIG)
    for file in ("own_losses.py", "own_schedules.py"):
        shutil.copy(OWN_CODE / file, place)
    small = ("--steps", "3", "--global-batch", "2", "--layouts", "zero1-pp2,zero2-dp2")
    said = dstrain("verify", "--config", "mine.yaml", *small, timeout=350)
    assert said.code == 0, said.out + said.err
    [table] = place.glob("runs/verify-*/verify.json")
    rows = json.loads(table.read_text())["layouts"]
    assert {row["layout"]: row["verdict"] for row in rows} == {
        "zero1-pp2-dp1": "equal",
        "zero2-pp1-dp2": "equal",
    }


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("loss=own_losses:mean",), "loss own_losses:mean returned a tensor float32 []"),
        (("loss=own_losses:focal", "loss_options={beta: 1}"), "loss own_losses:focal failed: TypeError"),
        (
            ("lr_schedule=own_schedules:not_finite",),
            "learning-rate schedule own_schedules:not_finite returned nan at step 4 of 4",
        ),
    ],
    ids=["a mean", "an option", "no number"],
)
def test_what_is_wrong_ends_the_run_with_its_name(
    settings: tuple[str, ...], words: str, place: Path, dstrain: Callable[..., Said]
) -> None:
    small = ("--model", "model", "--data", "text.jsonl", "--steps", "4", "--seq-len", "32", "--pipeline", "2")
    code = ("--set", f"code_dirs=[{OWN_CODE}]", "--set", "warmup_steps=0", "--name", "wrong")
    chosen = [part for setting in settings for part in ("--set", setting)]
    said = dstrain("run", *small, *code, *chosen)
    assert said.code == 1 and words in said.err, said.out + said.err
