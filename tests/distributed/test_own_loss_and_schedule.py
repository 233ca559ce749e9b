"""A loss and a schedule from outside train in every layout what they train in a plain loop, and go on in another."""

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
)
from tests.support.distributed.training import OWN_LOSS, OWN_SCHEDULE, Case, train_in_layout
from tests.support.distributed.workers import WorkerError, run

LOSS = Case(loss=OWN_LOSS, steps=9)
SCHEDULE = Case(lr_schedule=OWN_SCHEDULE, steps=9)
BOTH = replace(LOSS, lr_schedule=OWN_SCHEDULE, steps=14)
DUALPIPEV: Layout = {"zero": 1, "pipeline": 2, "schedule": "dualpipev"}

CASES = [
    replace(LOSS, **ZERO2_DP2),
    replace(LOSS, **ZERO1_2X2),
    replace(LOSS, **ZERO3_DP2, loss_chunk=24),
    replace(LOSS, **ZERO1_PP2, loss_chunk=24),
    replace(LOSS, **ZERO1_PP2, experts=4, steps=20),
    replace(SCHEDULE, **ZERO2_DP2),
    replace(SCHEDULE, **ZERO1_2X2),
    replace(BOTH, **DUALPIPEV),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("trained"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_layout_trains_what_a_plain_loop_trains(case: Case) -> None:
    assert_equal(case, run(case.world_size, train_in_layout, case))


@pytest.mark.heavy
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_16_bits_train_what_a_plain_loop_trains(precision: str) -> None:
    case = Case(loss=OWN_LOSS, precision=precision, zero=1, pipeline=2, loss_chunk=24)
    assert_equal(case, run(case.world_size, train_in_layout, case))


@pytest.mark.parametrize(("before", "after"), [(ZERO2_DP2, ZERO1_PP2), (ZERO1_PP2, ONE)], ids=str)
def test_it_goes_on_in_another_layout(
    before: Layout, after: Layout, trained: Trained, tmp_path: Path
) -> None:
    a, b = replace(BOTH, **before), replace(BOTH, **after)
    ranks = run(b.world_size, go_on, b, str(trained(a)), str(tmp_path))
    assert_same_state(trained(a), tmp_path, b)
    assert_goes_on(b, ranks, a.in_one_process())


@pytest.mark.parametrize("layout", [ONE, ZERO1_PP2], ids=str)
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("own_losses:mean", r"loss own_losses:mean returned a tensor float32 \[\]"),
        ("own_losses:detached", "loss own_losses:detached returned losses without a gradient"),
        ("own_losses:broken", "loss own_losses:broken failed: RuntimeError"),
    ],
)
def test_what_is_no_loss_of_tokens_is_refused(name: str, words: str, layout: Layout) -> None:
    case = Case(loss=name, **layout)
    with pytest.raises(WorkerError, match=words):
        run(case.world_size, train_in_layout, case)
