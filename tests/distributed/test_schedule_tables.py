"""The schedules' tables beside those of torch.distributed.pipelining, and 1F1B's beside DeepSpeed's instructions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dstrain.planning.schedules.named import (
    interleaved,
    one_forward_one_backward,
    zero_bubble_h1,
    zero_bubble_v,
)
from dstrain.planning.schedules.simulate import Costs, simulate
from dstrain.planning.schedules.table import Action, Table, in_a_circle, in_a_v

SIZES = [(2, 4), (4, 4), (4, 8), (4, 16), (8, 16)]


def from_torch(name: str, ranks: int, micro_batches: int, placement: tuple[int, ...]) -> Table:
    """A schedule of torch's as a table of ours; its reductions of gradients are left out."""
    from torch.distributed.pipelining import schedules

    chunks = len(placement) // ranks
    schedule = SimpleNamespace(
        _num_stages=ranks,
        _n_microbatches=micro_batches,
        pp_group_size=ranks,
        num_stages=ranks * chunks,
        n_local_stages=chunks,
        microbatches_per_round=ranks,
    )
    made = getattr(schedules, name)
    if chunks == 1:
        rows = made._get_pipeline_order(schedule)
    else:
        rows = {rank: made._calculate_single_rank_operations(schedule, rank) for rank in range(ranks)}
    return Table(tuple(tuple(_actions(rows[rank])) for rank in range(ranks)), placement, micro_batches)


def _actions(row: list[Any]) -> list[Action]:
    kinds = ("F", "B", "I", "W")
    return [
        Action(one.computation_type.value, one.stage_index, one.microbatch_index)
        for one in row
        if one is not None and one.computation_type.value in kinds
    ]


@pytest.mark.parametrize(("ranks", "micro_batches"), SIZES)
def test_1f1b_is_torch_s(ranks: int, micro_batches: int) -> None:
    """But for the numbers of the micro-batches, of which torch's picture of it leaves out the last rank's first."""
    ours = one_forward_one_backward(ranks, micro_batches)
    theirs = from_torch("Schedule1F1B", ranks, micro_batches, ours.placement)
    assert [[a.kind for a in row] for row in ours.ranks] == [[a.kind for a in row] for row in theirs.ranks]


@pytest.mark.parametrize(("ranks", "micro_batches"), SIZES)
def test_interleaved_is_torch_s(ranks: int, micro_batches: int) -> None:
    ours = interleaved(ranks, micro_batches)
    assert ours == from_torch("ScheduleInterleaved1F1B", ranks, micro_batches, ours.placement)


@pytest.mark.parametrize(("ranks", "micro_batches"), SIZES)
def test_1f1b_is_deepspeed_s(ranks: int, micro_batches: int) -> None:
    from deepspeed.runtime.pipe.schedule import TrainSchedule

    for rank, actions in enumerate(one_forward_one_backward(ranks, micro_batches).ranks):
        steps = TrainSchedule(micro_batches=micro_batches, stages=ranks, stage_id=rank).steps()
        passes = [type(each).__name__[0] for step in steps for each in step if "Pass" in type(each).__name__]
        assert passes == [action.kind for action in actions]


@pytest.mark.parametrize(("ranks", "micro_batches"), [(2, 4), (4, 8), (4, 16), (8, 16), (8, 32)])
def test_zero_bubble_v_beside_torch_s(ranks: int, micro_batches: int) -> None:
    """At most 2 % slower, with messages that take no time."""
    costs = Costs.even(2 * ranks, ranks=ranks)
    theirs = simulate(from_torch("ScheduleZBVZeroBubble", ranks, micro_batches, in_a_v(ranks)), costs)
    ours = simulate(zero_bubble_v(ranks, micro_batches), costs)
    assert ours.total <= 1.02 * theirs.total
    assert max(ours.peaks) <= max(theirs.peaks)


def test_zero_bubble_h1_beside_torch_s_interleaved() -> None:
    around = from_torch("ScheduleInterleaved1F1B", 4, 8, in_a_circle(4, 2))
    least = simulate(zero_bubble_h1(4, 8), Costs.even(4)).total
    assert least < simulate(around, Costs.even(8, ranks=4)).total
