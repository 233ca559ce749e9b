"""``dstrain resume RUN`` with another layout, through the launcher: the same training, told by the metrics file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Said

pytestmark = pytest.mark.timeout(300)

COMMON = [
    *(
        "--model",
        "model",
        "--data",
        "text.jsonl",
        "--precision",
        "fp32",
        "--seq-len",
        "32",
        "--global-batch",
        "8",
    ),
    *("--set", "lr_schedule=constant", "--lr", "3e-3", "--set", "eps=1e-5", "--set", "save_every=3"),
    *("--set", "sample_tokens=0", "--set", "held_out=0.2"),
]


def records(place: Path, name: str) -> list[dict[str, Any]]:
    lines = (place / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["step"]]


def test_a_run_goes_on_in_another_layout(
    place: Path, dstrain: Callable[..., Said], dstrain_here: Callable[..., Said]
) -> None:
    first = [*("--zero", "1", "--pipeline", "2", "--micro-batch", "2")]
    short = dstrain("run", *COMMON, *first, "--steps", "3", "--name", "moved")
    assert short.code == 0, short.out + short.err
    whole = dstrain("run", *COMMON, "--zero", "0", "--steps", "6", "--name", "whole")
    assert whole.code == 0, whole.out + whole.err

    elsewhere = ["--zero", "3", "--pipeline", "1", "--data-parallel", "2"]
    for wrong, words in (
        (["--precision", "bf16"], "precision = fp32, and this run has bf16"),
        (["--global-batch", "16"], "global_batch = 8, and this run has 16"),
        (["--pipeline", "2", "--schedule", "dualpipev"], "dualpipev runs the backward passes"),
        (["--data-parallel", "3"], "can't be shared by 3 replicas"),
    ):
        refused = dstrain_here("resume", "moved", "--steps", "6", *elsewhere, *wrong, "--dry-run")
        assert refused.code == 2 and words in refused.err, refused.err
    assert "has finished its 3 steps" in dstrain_here("resume", "moved", *elsewhere).out

    said = dstrain("resume", "moved", "--steps", "6", *elsewhere)
    assert said.code == 0, said.out + said.err
    assert "zero1-pp2-dp1 -> zero3-pp1-dp2: each rank reads" in said.out
    moved, unbroken = records(place, "moved"), records(place, "whole")
    assert [record["step"] for record in moved] == [1, 2, 3, 4, 5, 6]
    for one, other in zip(moved, unbroken, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)
        assert (one["lr"], one["tokens"]) == (other["lr"], other["tokens"])
    assert moved[5]["loss"] < moved[0]["loss"] - 0.05, "it learns"

    listed = dstrain_here("checkpoints", "moved").out
    assert "zero1-pp2-dp1" in listed and "zero3-pp1-dp2" in listed
