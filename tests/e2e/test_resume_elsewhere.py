"""``dstrain resume RUN`` with another layout, through the launcher: the same training, told by the metrics file."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dstrain.runs.checkpoint.manifest import MANIFEST, digest
from tests.support.e2e import Said

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
    *("--set", "sample_tokens=0", "--set", "validation=0.2"),
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
        (["--precision", "bf16"], "precision = fp32, but this run has bf16"),
        (["--global-batch", "16"], "global_batch = 8, but this run has 16"),
        (["--pipeline", "2", "--schedule", "dualpipev"], "dualpipev alternates the backward passes"),
        (["--data-parallel", "3"], "can't be divided evenly among 3 replicas"),
    ):
        refused = dstrain_here("resume", "moved", "--steps", "6", *elsewhere, *wrong, "--dry-run")
        assert refused.code == 2 and words in refused.err, refused.err
    assert "has finished its 3 steps" in dstrain_here("resume", "moved", *elsewhere).out

    said = dstrain("resume", "moved", "--steps", "6", *elsewhere)
    assert said.code == 0, said.out + said.err
    assert "zero1-pp2-dp1 -> zero3-pp1-dp2: the same training continues" in said.out
    moved, unbroken = records(place, "moved"), records(place, "whole")
    assert [record["step"] for record in moved] == [1, 2, 3, 4, 5, 6]
    for one, other in zip(moved, unbroken, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)
        assert (one["lr"], one["tokens"]) == (other["lr"], other["tokens"])
    assert moved[5]["loss"] < moved[0]["loss"] - 0.05, "it learns"

    listed = dstrain_here("checkpoints", "moved").out
    assert "zero1-pp2-dp1" in listed and "zero3-pp1-dp2" in listed
    exported = dstrain("export", "moved", "out")
    assert exported.code == 0, exported.out + exported.err
    losses = [
        float(found) for found in re.findall(r"^(?:validation)? +(\d\.\d+)", exported.out, re.MULTILINE)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5), exported.out
    assert losses[1] == pytest.approx(moved[5]["validation_loss"], abs=1e-6), exported.out


class Call:
    """What unpickles into a shell's command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def poison(checkpoint: Path, marker: Path) -> None:
    """Put a call into a file of the checkpoint, and its checksum into the manifest, as one could who means it."""
    import torch

    from dstrain.engine.safe_unpickling import load_safely

    path = checkpoint / "state" / "mp_rank_00_model_states.pt"
    torch.save(load_safely(path) | {"more": Call(f"touch {marker}")}, path)
    record = json.loads((checkpoint / MANIFEST).read_text())
    content = path.read_bytes()
    file = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    record["files"]["state/mp_rank_00_model_states.pt"] = file
    del record["sha256"]
    (checkpoint / MANIFEST).write_text(json.dumps(record | {"sha256": digest(record)}))


def test_code_in_a_checkpoint_is_never_run(place: Path, dstrain: Callable[..., Said]) -> None:
    first = ["--zero", "1", "--pipeline", "2", "--micro-batch", "2", "--set", "validation=0"]
    made = dstrain("run", *COMMON, *first, "--steps", "1", "--name", "given")
    assert made.code == 0, made.out + made.err
    marker = place / "marker"
    poison(place / "runs" / "given" / "checkpoints" / "step-000001", marker)
    for command in (
        ["resume", "given", "--steps", "2"],
        ["resume", "given", "--steps", "2", "--zero", "3", "--pipeline", "1"],
        ["export", "given", "out", "--no-loss"],
    ):
        said = dstrain(*command)
        assert said.code, said.out
        assert said.err.count("refers to posix.system, which does not belong in a checkpoint") == 1, said.err
        assert "step-000001/state/mp_rank_00_model_states.pt: this checkpoint file" in said.err
        assert "Traceback" not in said.err and "continues from step-000001" not in said.err, said.err
        assert not marker.exists(), f"{command} has run what the checkpoint names"
