"""What only NCCL can show: several GPUs exchange messages, a run is stopped and goes on in another layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import dstrain
from tests.support.gpu.machine import need

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]


def losses(folder: Path) -> dict[int, float]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {record["step"]: record["loss"] for record in map(json.loads, lines) if "loss" in record}


@pytest.mark.parametrize(("pipeline", "data_parallel"), [(1, 2), (2, 1), (2, 2)])
def test_a_run_goes_on_in_another_layout(
    pipeline: int, data_parallel: int, materials: Path, tmp_path: Path, record_property: pytest.RecordProperty
) -> None:
    """Six steps at once on one GPU, or three on several and three more on one."""
    need(pipeline * data_parallel)
    flags = {
        "model": str(materials / "model"),
        "data": str(materials / "text.jsonl"),
        "tokenizer": "bytes",
        "seq_len": 32,
        "global_batch": 8,
        "micro_batch": 2,
        "steps": 6,
        "warmup_steps": 1,
        "sample_tokens": 0,
        "save_every": 3,
        "validation": 0.2,
        "runs_dir": str(tmp_path),
    }
    one = dstrain.run(dstrain.load_config(flags={**flags, "name": "one", "data_parallel": 1}))
    layout = {"pipeline": pipeline, "data_parallel": data_parallel, "zero": 1}
    several = dstrain.run(dstrain.load_config(flags={**flags, **layout, "name": "several", "steps": 3}))
    dstrain.resume(several.folder, changes={"steps": 6, "pipeline": 1, "data_parallel": 1})
    wanted, found = losses(one.folder), losses(several.folder)
    difference = max(abs(found[step] - loss) / loss for step, loss in wanted.items())
    record_property("difference", difference)
    assert found.keys() == wanted.keys() and difference < 1e-5
