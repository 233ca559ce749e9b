"""An optimizer from outside trains in every layout what it trains in a plain loop, and goes on in another layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.distributed.compare import assert_equal
from tests.support.distributed.elsewhere import (
    ONE,
    ZERO1_2X2,
    ZERO1_PP2,
    ZERO2_DP2,
    ZERO3_DP2,
    Layout,
    Trained,
    assert_goes_on,
    assert_same_state,
    go_on,
    resume_alike,
)
from tests.support.distributed.training import OWN, Case, train_in_layout
from tests.support.distributed.workers import WorkerError, run

OWN_CASE = Case(optimizer=OWN, steps=9)

LAYOUTS: list[Layout] = [
    {"zero": 0, "data_parallel": 2},
    ZERO1_PP2,
    ZERO2_DP2,
    ZERO3_DP2,
    {"zero": 2, "data_parallel": 2, "offload": "cpu"},
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("trained"))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_trains_what_a_plain_loop_trains(layout: Layout) -> None:
    case = replace(OWN_CASE, **layout)
    assert_equal(case, run(case.world_size, train_in_layout, case))


@pytest.mark.parametrize("case", [replace(OWN_CASE, **ZERO1_PP2), replace(OWN_CASE, **ZERO3_DP2)], ids=str)
def test_it_goes_on_in_its_layout_to_the_bit(case: Case, trained: Trained) -> None:
    whole = run(case.world_size, train_in_layout, case)
    resumed = run(case.world_size, resume_alike, case, str(trained(case)))
    for rank, again in zip(whole, resumed, strict=True):
        assert again.losses == rank.losses[-len(again.losses) :] and again.losses


@pytest.mark.parametrize(
    ("before", "after"),
    [(ZERO1_PP2, ONE), (ZERO2_DP2, ZERO1_2X2), (ONE, ZERO3_DP2), (ZERO3_DP2, ZERO1_PP2)],
    ids=str,
)
def test_it_goes_on_in_another_layout(
    before: Layout, after: Layout, trained: Trained, tmp_path: Path
) -> None:
    a, b = replace(OWN_CASE, **before), replace(OWN_CASE, **after)
    ranks = run(b.world_size, go_on, b, str(trained(a)), str(tmp_path))
    assert_same_state(trained(a), tmp_path, b)
    assert_goes_on(b, ranks, a.in_one_process())


def test_a_state_of_another_shape_stays_in_its_layout(trained: Trained, tmp_path: Path) -> None:
    case = replace(OWN_CASE, optimizer="own_optimizers:Factored", **ZERO2_DP2)
    other = replace(case, **ZERO1_PP2)
    resumed = run(case.world_size, resume_alike, case, str(trained(case)))
    assert len(resumed[0].losses) == case.steps - 4
    with pytest.raises(WorkerError, match=r"factor of .* has not a number for each"):
        run(other.world_size, go_on, other, str(trained(case)), str(tmp_path))
    assert_goes_on(case, resumed, OWN_CASE.in_one_process())  # it trains what Momentum trains


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("own_optimizers:Odd", "keeps a Generator as 'random', which a checkpoint can't hold"),
        ("own_optimizers:WithoutDecay", "takes no weight_decay, and the run has 0.1"),
        ("own_optimizers:nothing", "is a str, not a torch.optim.Optimizer"),
        ("own_optimizers:slow_momentum", "unexpected keyword argument 'beta'"),
    ],
)
def test_what_would_be_lost_or_ignored_is_refused(name: str, words: str) -> None:
    with pytest.raises(WorkerError, match=words):
        run(1, train_in_layout, replace(OWN_CASE, optimizer=name))
