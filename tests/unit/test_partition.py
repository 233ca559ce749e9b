"""The cut against every other cut, free and within a memory, of one and of two chunks a stage."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dstrain.planning.partition import (
    blocks_of_chunks,
    cut_by_blocks,
    cut_by_cost,
    cut_folded,
    even_blocks,
)


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
    assert cut is not None and len(cut) == stages + 1 and cut[0] == 0 and cut[-1] == len(costs)
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
    cut = cut_by_cost(costs, stages)
    assert cut is not None and len(cut) == stages + 1


@pytest.mark.parametrize("stages", [0, 4, -1])
def test_impossible_numbers_of_stages(stages: int) -> None:
    with pytest.raises(ValueError, match="stages"):
        cut_by_cost([1, 2, 3], stages)


# --- under a memory cap


@given(
    layers=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 9)), min_size=1, max_size=8),
    limit=st.integers(0, 40),
    data=st.data(),
)
def test_no_other_cut_that_fits_is_better(
    layers: list[tuple[int, int]], limit: int, data: st.DataObject
) -> None:
    """The first stage keeps as many micro-batches as there are stages, the last one keeps one."""
    costs, weights = [cost for cost, _ in layers], [weight for _, weight in layers]
    stages = data.draw(st.integers(1, len(costs)))

    def fits(stage: int, start: int, end: int) -> bool:
        return (stages - stage) * sum(weights[start:end]) <= limit

    def farthest(stage: int, start: int) -> int:
        return max(end for end in range(start, len(costs) + 1) if fits(stage, start, end))

    cuts = [(0, *inner, len(costs)) for inner in itertools.combinations(range(1, len(costs)), stages - 1)]
    fitting = [cut for cut in cuts if all(fits(s, a, b) for s, (a, b) in enumerate(itertools.pairwise(cut)))]
    found = cut_by_cost(costs, stages, farthest)
    assert (found is None) == (not fitting)
    if found is not None:
        assert found in fitting
        assert quality(costs, found) == min(quality(costs, other) for other in fitting)


# --- two chunks a stage


def folded(costs: Sequence[float], cut: Sequence[int]) -> list[float]:
    chunks = stage_costs(costs, cut)
    return [chunks[stage] + chunks[-1 - stage] for stage in range(len(chunks) // 2)]


def least_folded(costs: Sequence[float], stages: int) -> float:
    inner = itertools.combinations(range(1, len(costs)), 2 * stages - 1)
    return min(max(folded(costs, (0, *cut, len(costs)))) for cut in inner)


@given(
    embed=st.integers(0, 20),
    kinds=st.tuples(st.integers(8, 20), st.integers(8, 20)),
    which=st.lists(st.booleans(), min_size=2, max_size=9),
    head=st.integers(0, 80),
    stages=st.integers(2, 3),
)
def test_folded_cuts_of_models_come_near_the_best(
    embed: int, kinds: tuple[int, int], which: list[bool], head: int, stages: int
) -> None:
    costs = [embed, *(kinds[one] for one in which), head]
    if len(costs) < 2 * stages:
        return
    cut = cut_folded(costs, stages)
    assert cut is not None and len(cut) == 2 * stages + 1 and all(a < b for a, b in itertools.pairwise(cut))
    # Blocks of one kind: the best. Of two kinds: less than a block away from it.
    distance = 0 if len({kinds[one] for one in which}) == 1 else max(kinds)
    assert max(folded(costs, cut)) <= least_folded(costs, stages) + distance


@given(costs=st.lists(st.integers(0, 60), min_size=6, max_size=12), stages=st.integers(2, 3))
def test_folding_is_never_worse_than_even_spans(costs: list[int], stages: int) -> None:
    cut, even = cut_folded(costs, stages), cut_by_cost(costs, 2 * stages)
    assert cut is not None and even is not None
    assert max(folded(costs, cut)) <= max(folded(costs, even))


# --- as asked


@pytest.mark.parametrize(
    ("blocks", "chunks", "even", "cut"),
    [
        (16, 4, (4, 4, 4, 4), (0, 5, 9, 13, 18)),
        (6, 4, (2, 2, 1, 1), (0, 3, 5, 6, 8)),
        (3, 4, (0, 1, 1, 1), (0, 1, 2, 3, 5)),
        (2, 4, (0, 1, 1, 0), (0, 1, 2, 3, 4)),
        (0, 2, (0, 0), (0, 1, 2)),
        (5, 1, (5,), (0, 7)),
    ],
)
def test_even_blocks(blocks: int, chunks: int, even: tuple[int, ...], cut: tuple[int, ...]) -> None:
    assert even_blocks(blocks, chunks) == even
    assert cut_by_blocks(even) == cut


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("5,5,5,1", (5, 5, 5, 1)),
        (" 5, 6 ", (5, 6)),
        ("16", (16,)),
        ("auto", None),
        ("5,,6", None),
        ("5,-1", None),
    ],
)
def test_numbers_of_blocks(text: str, blocks: tuple[int, ...] | None) -> None:
    assert blocks_of_chunks(text) == blocks
