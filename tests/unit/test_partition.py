"""The cut against every other cut."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dstrain.plan.partition import cut_by_cost


def stage_costs(costs: Sequence[float], cut: Sequence[int]) -> list[float]:
    return [sum(costs[a:b]) for a, b in itertools.pairwise(cut)]


def quality(costs: Sequence[float], cut: Sequence[int]) -> tuple[float, float]:
    stages = stage_costs(costs, cut)
    return max(stages), sum(cost**2 for cost in stages)


# Whole numbers: with floats, sums of other orders would differ in the last bit.
@given(costs=st.lists(st.integers(0, 60), min_size=1, max_size=8), data=st.data())
def test_no_other_cut_is_better(costs: list[int], data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, len(costs)))
    cut = cut_by_cost(costs, stages)
    assert len(cut) == stages + 1 and cut[0] == 0 and cut[-1] == len(costs)
    assert all(a < b for a, b in itertools.pairwise(cut))
    others = ((0, *inner, len(costs)) for inner in itertools.combinations(range(1, len(costs)), stages - 1))
    assert quality(costs, cut) == min(quality(costs, other) for other in others)


def test_a_heavy_head_excuses_a_heavier_stage_before_it_but_the_others_stay_even() -> None:
    """9, 2, 6 beside a head of 100, not 1, 8, 8: one search by (largest, squares) drops the evener cut before it
    has seen the head."""
    assert cut_by_cost([1, 8, 2, 0, 6, 100], 4) == (0, 2, 3, 5, 6)


@pytest.mark.parametrize(
    ("costs", "stages", "cut"),
    [
        ([1, 1, 1, 1], 2, (0, 2, 4)),
        ([1, 1, 1, 1], 4, (0, 1, 2, 3, 4)),
        ([5], 1, (0, 1)),
        ([0, 4, 4, 4, 4, 2], 2, (0, 3, 6)),
        ([0, 1, 1, 1, 1, 8], 3, (0, 3, 5, 6)),
        ([0, 0, 0], 3, (0, 1, 2, 3)),
    ],
)
def test_cuts(costs: list[int], stages: int, cut: tuple[int, ...]) -> None:
    assert cut_by_cost(costs, stages) == cut


@given(costs=st.lists(st.floats(0, 1e15), min_size=1, max_size=12), data=st.data())
@example(costs=[0.1, 0.2, 0.3], data=None)
def test_any_costs_give_a_cut(costs: list[float], data: st.DataObject | None) -> None:
    stages = data.draw(st.integers(1, len(costs))) if data else 2
    assert len(cut_by_cost(costs, stages)) == stages + 1


@pytest.mark.parametrize("stages", [0, 4, -1])
def test_impossible_numbers_of_stages(stages: int) -> None:
    with pytest.raises(ValueError, match="stages"):
        cut_by_cost([1, 2, 3], stages)
