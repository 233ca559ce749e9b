"""``dstrain rehearse``: what it shows of a small run, and that planted faults are found with their file and line."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dstrain
from dstrain.api.rehearsing import RehearsalResult
from dstrain.estimate import memory_states
from dstrain.report.rehearsal import LIMITS, STEP
from tests.rehearsal.conftest import Rehearse
from tests.support.own_code import own_losses

OWN_CODE = Path(__file__).parents[1] / "support" / "own_code"
SMALL = ("--seq-len", "64", "--global-batch", "16", "--micro-batch", "2", "--tokenizer", "bytes")
ELSEWHERE = ("--device", "h100-80g", "--gpus-per-node", "4")


def typed(*words: str) -> subprocess.CompletedProcess[str]:
    """A command as a user types it."""
    command = [sys.executable, "-m", "dstrain.cli.main", *words]
    wide = {**os.environ, "COLUMNS": "300"}
    return subprocess.run(command, env=wide, capture_output=True, text=True, timeout=500)


def test_each_section_is_shown(materials: Path) -> None:
    """A stage of a pipeline with ZeRO-1, whose plan holds: exit code 0."""
    data = ("--model", str(materials / "model"), "--data", str(materials / "text.jsonl"))
    layout = ("--pipeline", "2", "--zero", "1", "--precision", "bf16")
    said = typed("rehearse", *data, *layout, *SMALL, *ELSEWHERE, "--stage", "1", "--trace")
    out = " ".join(said.stdout.split())
    assert said.returncode == 0, said.stdout + said.stderr
    assert "stage 1 of 2, rank 1" in out
    for name in ("parameters", "gradients", "optimizer", "activations", "loss", "buffers", "total"):
        assert f" {name} " in out, name
    for phase in ("build", "step 1", "step 2", "validation", "checkpoint", "resume", "generation"):
        assert f"{phase} " in out, phase
    assert "reduced gradients" in out and "between stages" in out
    for kind in ("all_reduce", "send", "recv", "all_gather_into_tensor"):
        assert f" {kind} " in out, kind
    assert "1 wait for the GPU in a step" in out
    assert " dstrain/engine/rank_engines.py:" in out
    assert "flash (varlen)" in out
    assert "made by" in out
    for limit in LIMITS:
        assert limit in out
    assert "as planned" in out


def test_what_cannot_be_rehearsed_is_refused(materials: Path) -> None:
    model = ("--model", str(materials / "model"), "--data", str(materials / "text.jsonl"), *SMALL)
    for words, message in (
        ((*ELSEWHERE, "--pipeline", "2", "--stage", "2"), "there is no stage 2"),
        ((*ELSEWHERE, "--stage", "0", "--all"), "--stage and --all can't be combined"),
        ((*ELSEWHERE, "--set", "attention=flash_attention_3"), "which is not installed here"),
    ):
        said = typed("rehearse", *model, "--precision", "bf16", *words)
        assert said.returncode == 2, said.stderr
        assert message in " ".join(said.stderr.split()), said.stderr


def test_varlen_attention_is_rehearsed_by_its_name(rehearse: Rehearse, materials: Path) -> None:
    model = str(materials / "model")
    result = rehearse(
        model=model, attention="varlen", seq_len=64, global_batch=8, micro_batch=2, zero=1, gpus_per_node=2
    )
    assert {call["kernel"] for call in result.stages[0].attention} == {"flash (varlen)"}


def test_a_plan_for_cpus_is_refused(materials: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    config = dstrain.load_config(
        model=str(materials / "model"), data=str(materials / "text.jsonl"), tokenizer="bytes", seq_len=64
    )
    with pytest.raises(dstrain.DstrainError, match="only GPUs are rehearsed"):
        dstrain.rehearse(config)


@pytest.fixture(scope="module")
def faulty(rehearse: Rehearse, materials: Path) -> Iterator[RehearsalResult]:
    """A run whose own loss does what a GPU does not bear, and whose plan counts AdamW's states twice."""
    with pytest.MonkeyPatch.context() as patch:
        right = memory_states.moment_bytes
        patch.setattr(memory_states, "moment_bytes", lambda config: 2 * right(config))
        yield rehearse(
            model=str(materials / "model"),
            loss="own_losses:unfit_for_gpus",
            code_dirs=[str(OWN_CODE)],
            seq_len=64,
            global_batch=8,
            micro_batch=2,
            zero=1,
            gpus_per_node=2,
        )


def line_of(words: str) -> int:
    """Where these words stand in the loss that waits."""
    lines, first = inspect.getsourcelines(own_losses.unfit_for_gpus)
    return first + next(number for number, line in enumerate(lines) if words in line)


def test_a_wait_in_the_loop_is_found(faulty: RehearsalResult) -> None:
    [stage] = faulty.stages
    there = f"own_losses.py:{line_of('.item()')}"
    [wait] = [w for w in stage.waits if w["phase"] == STEP and there in w["where"]]
    assert wait["what"] == "item"
    assert wait["count"] == faulty.plan.batch.accumulation


def test_a_tensor_of_the_host_in_a_collective_is_found(faulty: RehearsalResult) -> None:
    [stage] = faulty.stages
    found = [wrong for wrong in stage.wrong_devices if wrong["phase"] == STEP]
    assert [wrong["what"] for wrong in found] == ["all_reduce of 3 x float32 on cpu"]
    assert f"own_losses.py:{line_of('all_reduce')}" in found[0]["where"]
    assert any("can't reach it" in difference for difference in faulty.differences)


def test_a_wrong_estimate_is_found(faulty: RehearsalResult) -> None:
    [stage] = faulty.stages
    by_name = {part.name: part for part in stage.memory}
    assert by_name["optimizer"].difference == pytest.approx(2 / 3, abs=0.01)  # 20 bytes in place of 12
    assert by_name["parameters"].difference == pytest.approx(0, abs=0.01)
    assert any(difference.startswith("stage 0: memory: ") for difference in faulty.differences)
    assert not faulty.agrees
    assert json.loads(json.dumps(faulty.to_record()))["agrees"] is False
