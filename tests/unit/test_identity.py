"""What must stay, and what may change, between a checkpoint and the run that goes on from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dstrain.errors import DstrainError
from dstrain.runs.checkpoint.identity import is_other_layout, refuse_other, refuse_other_batch, what_changes
from dstrain.runs.checkpoint.manifest import MANIFEST
from tests.support.plans import plan

BEFORE: dict[str, Any] = {"zero": 1, "pipeline": 2, "data_parallel": 2, "micro_batch": 2, "global_batch": 16}


def saved(folder: Path, identity: dict[str, Any]) -> Path:
    checkpoint = folder / "step-000040"
    checkpoint.mkdir(exist_ok=True)
    (checkpoint / MANIFEST).write_text(json.dumps({"step": 40, "files": {"a": 1}, "identity": identity}))
    return checkpoint


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return saved(tmp_path, plan(**BEFORE).identity)


def test_nothing_changes(checkpoint: Path) -> None:
    same = plan(**BEFORE, lr=1e-5, steps=7).identity
    refuse_other(checkpoint, same)
    assert not is_other_layout(checkpoint, same) and what_changes(checkpoint, same) == []


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ({"zero": 0}, "zero0-pp2-dp2"),
        ({"zero": 3}, "zero3-pp2-dp2"),
        ({"pipeline": 1}, "zero1-pp1-dp2"),
        ({"data_parallel": 4}, "zero1-pp2-dp4"),
        ({"schedule": "dualpipev", "pipeline": 2}, "zero1-pp2-dp2-dualpipev"),
        ({"offload": "cpu"}, "zero1-pp2-dp2-cpu"),
    ],
)
def test_another_layout_is_the_same_training(flags: dict[str, Any], name: str, checkpoint: Path) -> None:
    other = plan(**(BEFORE | flags)).identity
    refuse_other(checkpoint, other)
    assert is_other_layout(checkpoint, other)
    [line] = what_changes(checkpoint, other)
    assert line.startswith(f"zero1-pp2-dp2 -> {name}: ") and line.endswith("step-000040")


def test_another_cut_is_another_layout(checkpoint: Path) -> None:
    other = plan(**BEFORE, partition="1,5").identity
    refuse_other(checkpoint, other)
    assert is_other_layout(checkpoint, other)
    [line] = what_changes(checkpoint, other)
    old = plan(**BEFORE).layout.cut[1]
    assert old != 2 and line.startswith(f"zero1-pp2-dp2 cut at {old} -> at 2: ")


def test_another_micro_batch_is_said_and_needs_no_other_files(checkpoint: Path) -> None:
    other = plan(**(BEFORE | {"micro_batch": 4})).identity
    refuse_other(checkpoint, other)
    assert not is_other_layout(checkpoint, other)
    [line] = what_changes(checkpoint, other)
    assert line.startswith("micro-batches of 2 -> 4: ") and "router loss" in line


@pytest.mark.parametrize(
    ("flags", "key"),
    [
        ({"global_batch": 32}, "global_batch"),
        ({"precision": "bf16"}, "precision"),
        ({"optimizer": "sgd"}, "optimizer"),
        ({"seed": 5}, "seed"),
        ({"seq_len": 128}, "seq_len"),
        ({"freeze": ["block 0.*"]}, "freeze"),
        ({"weight_decay": 0.2}, "weight_decay"),
    ],
)
@pytest.mark.parametrize("layout", [{}, {"pipeline": 1}], ids=["same layout", "another layout"])
def test_another_training_is_refused(
    flags: dict[str, Any], key: str, layout: dict[str, Any], checkpoint: Path
) -> None:
    identity = plan(**(BEFORE | layout)).identity | flags  # as if these could be planned together
    with pytest.raises(DstrainError, match=f"the checkpoint was made with {key} = ") as error:
        refuse_other(checkpoint, identity)
    assert f"resume with the same {key}" in str(error.value)


@pytest.mark.parametrize(
    ("replicas", "hint"),
    [(3, "--data-parallel 2 or 4"), (12, "--data-parallel 8 or 16"), (20, "--data-parallel 16")],
)
def test_replicas_that_do_not_share_the_batch(replicas: int, hint: str, checkpoint: Path) -> None:
    with pytest.raises(DstrainError, match="and can't change on resume") as error:
        refuse_other_batch(checkpoint, global_batch=16, data_parallel=replicas)
    assert error.value.hint == hint


def test_another_batch_is_refused_before_the_plan(checkpoint: Path) -> None:
    for replicas in (None, 1, 8, 16):
        refuse_other_batch(checkpoint, global_batch=16, data_parallel=replicas)
    with pytest.raises(DstrainError, match="made with global_batch = 16, but this run has 12"):
        refuse_other_batch(checkpoint, global_batch=12, data_parallel=3)


@pytest.mark.parametrize(("old", "new"), [("nvme", "none"), ("none", "nvme"), ("nvme", "cpu")])
def test_swap_files_bind_a_run_to_its_layout(old: str, new: str, tmp_path: Path) -> None:
    identity = plan(zero=3, data_parallel=2).identity
    checkpoint = saved(tmp_path, identity | {"offload": old})
    refuse_other(checkpoint, identity | {"offload": old})
    with pytest.raises(DstrainError, match="swap files") as error:
        refuse_other(checkpoint, identity | {"offload": new})
    assert "zero3-pp1-dp2" in str(error.value) and "-nvme" in str(error.value)


def test_a_checkpoint_of_before_layouts_could_change(tmp_path: Path) -> None:
    identity = plan(**BEFORE).identity
    checkpoint = saved(tmp_path, {key: value for key, value in identity.items() if key != "micro_batch"})
    refuse_other(checkpoint, identity)
    assert not is_other_layout(checkpoint, identity) and what_changes(checkpoint, identity) == []
