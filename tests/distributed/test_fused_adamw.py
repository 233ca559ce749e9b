"""AdamW in one kernel, as GPUs have it: the same training as a plain loop's, also where another layout goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.distributed.compare import assert_equal
from tests.support.distributed.elsewhere import (
    SAVED_AT,
    ZERO1_2X2,
    ZERO3_DP2,
    assert_goes_on,
    assert_same_state,
    go_on,
    train_and_save,
)
from tests.support.distributed.training import Case, train_in_layout
from tests.support.distributed.workers import run

LAYOUTS = [
    Case(zero=0, data_parallel=2, fused=True),
    Case(zero=1, pipeline=2, data_parallel=2, precision="bf16", fused=True),
    Case(zero=2, data_parallel=2, fused=True),
    Case(zero=3, pipeline=2, tied=False, fused=True),
]


@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_it_trains_the_same_model(case: Case) -> None:
    assert_equal(case, run(case.world_size, train_in_layout, case))


def test_another_layout_goes_on(tmp_path: Path) -> None:
    before, after = (replace(Case(steps=9, fused=True), **layout) for layout in (ZERO1_2X2, ZERO3_DP2))
    run(before.world_size, train_and_save, replace(before, steps=SAVED_AT), str(tmp_path / "saved"))
    ranks = run(after.world_size, go_on, after, str(tmp_path / "saved"), str(tmp_path / "at-once"))
    assert_same_state(tmp_path / "saved", tmp_path / "at-once", after)
    assert_goes_on(after, ranks, replace(before.in_one_process(), fused=False))
