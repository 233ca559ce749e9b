"""What is special where a checkpoint is brought into another layout, and what is refused."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from dstrain.engine.safe_unpickling import load_safely
from tests.support.distributed import training
from tests.support.distributed.elsewhere import (
    FP32,
    SAVED_AT,
    ZERO1_PP2,
    ZERO2_DP2,
    ZERO3_DP2,
    Layout,
    Trained,
    assert_goes_on,
    assert_same_state,
    go_on,
    nothing,
    resume_alike,
    unbroken,
)
from tests.support.distributed.training import Case, Outcome
from tests.support.distributed.workers import WorkerError, run
from tests.support.sampling import full

FP16 = Case(precision="fp16", loss_scale_power=26, steps=9)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("trained"))


def skipped(norms: list[float]) -> list[bool]:
    return [norm == float("inf") for norm in norms]


def test_fp16_goes_on_with_the_loss_scale_that_was_found(trained: Trained, tmp_path: Path) -> None:
    """2^26 overflows at first. An engine that began anew would skip the same number of steps once more."""
    a, b = replace(FP16, **ZERO1_PP2), replace(FP16, zero=3)
    ranks = run(b.world_size, go_on, b, str(trained(a)), str(tmp_path))
    assert_same_state(trained(a), tmp_path, b)
    whole = skipped(unbroken(a.in_one_process()).norms)
    assert all(whole[: SAVED_AT + 1]) and not whole[-1]
    assert skipped(ranks[0].norms) == whole[SAVED_AT:]


def test_a_checkpoint_of_before_the_first_applied_step(trained: Trained, tmp_path: Path) -> None:
    """fp16 has skipped all steps so far: there are no optimizer states to be had, nor any to be missed."""
    from dstrain.engine.checkpoint_state import MASTER, SavedState

    a, b = replace(FP16, **ZERO3_DP2), replace(FP16, **ZERO1_PP2, steps=SAVED_AT + 1)
    run(b.world_size, go_on, b, str(trained(a)), str(tmp_path))
    state = SavedState(trained(a))
    assert state.counters["skipped_steps"] == SAVED_AT
    assert all(parameter.states.keys() == {MASTER} for parameter in state.parameters.values())
    assert_same_state(trained(a), tmp_path, b)


def in_small_groups() -> None:
    """ZeRO-3 works on its groups part by part, as it does with those of more than 10^9 numbers."""
    plan_of = training.make_case_plan

    def make_case_plan(case: Case) -> Any:
        plan = plan_of(case)
        plan.deepspeed["zero_optimization"]["sub_group_size"] = 3000
        return plan

    training.make_case_plan = make_case_plan


@pytest.mark.parametrize(
    ("before", "after", "small"), [(ZERO3_DP2, ZERO1_PP2, "before"), *full((ZERO1_PP2, ZERO3_DP2, "after"))]
)
def test_zero_3_with_groups_in_small_parts(
    before: Layout, after: Layout, small: str, trained: Trained, tmp_path: Path
) -> None:
    a, b = replace(FP32, **before), replace(FP32, **after)
    start = trained(a, in_small_groups if small == "before" else nothing)
    change = in_small_groups if small == "after" else nothing
    ranks = run(b.world_size, partial(go_on, change=change), b, str(start), str(tmp_path))
    [path] = (start if small == "before" else tmp_path).rglob("zero_pp_rank_0_mp_rank_00_optim_states.pt")
    assert len(load_safely(path)["optimizer_state_dict"]["fp32_flat_groups"]) > 6, "there are small parts"
    assert_same_state(start, tmp_path, b)
    assert_goes_on(b, ranks, a.in_one_process())


def in_one_piece() -> None:
    """As a family is trained that can't be cut into layers: its parameters have no layer's number in front."""
    from dstrain.model import pipeline_model
    from dstrain.model.unsplit_model import UnsplitModel

    pipeline_model.PipelineModel = UnsplitModel


@pytest.mark.parametrize(
    ("before", "after"), [(ZERO3_DP2, {"zero": 0}), *full(({"zero": 0}, ZERO2_DP2))], ids=str
)
def test_a_model_in_one_piece_goes_on(
    before: Layout, after: Layout, trained: Trained, tmp_path: Path
) -> None:
    a, b = replace(FP32, **before), replace(FP32, **after)
    start = trained(a, in_one_piece)
    ranks = run(b.world_size, partial(go_on, change=in_one_piece), b, str(start), str(tmp_path))
    assert_same_state(start, tmp_path, b, layers=0)
    assert_goes_on(b, ranks, a.in_one_process())


@pytest.mark.parametrize("after", [ZERO1_PP2, *full(ZERO3_DP2, {"zero": 0, "pipeline": 2})], ids=str)
def test_what_is_saved_after_the_change_is_resumed_as_ever(
    after: Layout, trained: Trained, tmp_path: Path
) -> None:
    """DeepSpeed's own loading finds all that it wants, to the bit."""
    start = trained(replace(FP32, **ZERO2_DP2))
    case = replace(FP32, **after, steps=SAVED_AT + 4)
    straight = run(case.world_size, go_on, case, str(start), str(tmp_path / "at-once"))
    short = replace(case, steps=SAVED_AT + 2)
    run(case.world_size, go_on, short, str(start), str(tmp_path / "at-once"), str(tmp_path / "saved"))
    rest = run(case.world_size, resume_alike, case, str(tmp_path / "saved"))
    for one, other in zip(straight, rest, strict=True):
        assert (one.losses[2:], one.norms[2:], one.validation) == (
            other.losses,
            other.norms,
            other.validation,
        )
        assert all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights)


def forgetful(rank: int, case: Case, start_from: str, at_once: str, lost: str) -> Outcome:
    """`go_on`, but something of the state is left behind."""
    from dstrain.engine import restore

    fill = restore._fill

    def fill_less(optimizer: Any, flat: Any, members: Any, shares: Any) -> None:
        fill(optimizer, flat, members, shares)
        if lost == "states":
            optimizer.state.pop(flat)
        else:
            optimizer.state[flat]["step"] = torch.tensor(1.0)

    restore._fill = fill_less
    return go_on(rank, case, start_from, at_once)


@pytest.mark.parametrize("lost", ["states", "step"])
def test_a_loss_of_state_would_be_seen(lost: str, trained: Trained, tmp_path: Path) -> None:
    a, b = replace(FP32, **ZERO1_PP2), replace(FP32, **ZERO2_DP2)
    ranks = run(b.world_size, forgetful, b, str(trained(a)), str(tmp_path), lost)
    with pytest.raises(AssertionError, match="is not within"):
        assert_goes_on(b, ranks, a.in_one_process())
    with pytest.raises(AssertionError):
        assert_same_state(trained(a), tmp_path, b)


def forget_names(state: dict[str, Any]) -> None:
    """As ZeRO-0 was saved before the names of its optimizer's states were kept."""
    del state["dstrain"]["parameter_names"]


def another_shape(state: dict[str, Any]) -> None:
    state["module"]["1.model.layers.0.mlp.up_proj.weight"] = torch.zeros(64, 31)


def another_name(state: dict[str, Any]) -> None:
    state["module"]["1.else"] = state["module"].pop("1.model.layers.0.mlp.up_proj.weight")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (forget_names, "does not say which optimizer state (exp_avg and exp_avg_sq) belongs to"),
        (another_shape, "up_proj.weight of [64, 32], and the checkpoint has one of [64, 31]"),
        (another_name, "up_proj.weight of [64, 32], and the checkpoint does not hold it"),
    ],
)
def test_what_the_checkpoint_lacks_is_refused(
    change: Callable[[dict[str, Any]], None], words: str, trained: Trained, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(trained(FP32), folder)
    path = folder / "state" / "mp_rank_00_model_states.pt"
    state = torch.load(path, weights_only=False)
    change(state)
    torch.save(state, path)
    with pytest.raises(WorkerError) as error:
        run(2, go_on, replace(FP32, data_parallel=2), str(folder), str(tmp_path / "at-once"))
    assert "DstrainError" in str(error.value) and words in str(error.value)


@pytest.mark.parametrize("layout", [ZERO1_PP2, ZERO3_DP2, ZERO2_DP2], ids=str)
def test_a_part_is_a_slice_of_the_whole(layout: Layout, trained: Trained) -> None:
    from dstrain.engine.checkpoint_state import SavedState

    case = replace(FP32, **layout)
    for parameter in SavedState(trained(case)).parameters.values():
        for tensor in (parameter.weight, *parameter.states.values()):
            whole = tensor.read().flatten()
            for start, stop in pairwise((0, 0, 1, 5, whole.numel() // 2, whole.numel() - 1, whole.numel())):
                assert torch.equal(tensor.part(start, stop - start), whole[start:stop])


def told_while_reading(rank: int, case: Case, start_from: str) -> list[str]:
    from dstrain.engine import restore

    restore._SECONDS_BETWEEN_WORDS = 0.0
    lines: list[str] = []
    engine, _ = training.build_case_engine(case)
    engine.load(Path(start_from), other_layout=True, say=lines.append)
    return lines


def test_a_long_reading_says_how_far_it_is(trained: Trained) -> None:
    case = replace(FP32, **ZERO2_DP2)
    for rank, lines in enumerate(run(2, told_while_reading, case, str(trained(replace(FP32, **ZERO1_PP2))))):
        told = [re.fullmatch(rf"rank {rank} has read (\d+)% of its part", line) for line in lines]
        percents = [int(match[1]) for match in told if match]
        assert len(percents) == len(lines) > 5
        assert percents == sorted(percents) and percents[0] < 30 and percents[-1] in (99, 100), percents
