"""An adapter's dropout drops the same in every layout: trainings are equal, and would not be with PEFT's own."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.support.distributed.compare import FP32_BOUND, Difference, difference
from tests.support.distributed.training import Case, Outcome, train_in_layout
from tests.support.distributed.workers import run
from tests.support.sampling import full, heavy

DROPOUT = Case(adapter="dropout", zero=1)
HEAD = replace(DROPOUT, adapter="dropout of the head")
DORA = replace(DROPOUT, adapter="dropout, dora")
STRICT = Difference(FP32_BOUND, FP32_BOUND, FP32_BOUND, FP32_BOUND)


@cache
def reference(adapter: str) -> Outcome:
    """One process, one micro-batch, nothing computed twice."""
    [outcome] = run(1, train_in_layout, Case(adapter=adapter, accumulation=1, zero=0))
    assert outcome.losses[-1] < 0.95 * outcome.losses[0]
    return outcome


CASES = [
    replace(DROPOUT, pipeline=2, data_parallel=2, zero=2),
    replace(DROPOUT, data_parallel=2, zero=3, checkpointing=True, accumulation=2),
    replace(HEAD, pipeline=2, loss_chunk=24, accumulation=8),
    *heavy(
        replace(DROPOUT, pipeline=4, checkpointing=True),
        replace(DROPOUT, pipeline=2, schedule="dualpipev", accumulation=4),
    ),
    *full(
        replace(DROPOUT, pipeline=4),
        replace(DROPOUT, accumulation=16),
        replace(DROPOUT, pipeline=2, data_parallel=2, zero=3, checkpointing=True, accumulation=8),
        replace(DROPOUT, data_parallel=4, zero=2, accumulation=1),
        replace(HEAD, data_parallel=2, loss_chunk=40, checkpointing=True),
        replace(DORA, pipeline=2, zero=2, checkpointing=True),
        replace(DORA, data_parallel=2, zero=3),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_layouts_drop_the_same(case: Case) -> None:
    found = difference(run(case.world_size, train_in_layout, case), reference(case.adapter))
    assert found.within(STRICT), found


def with_pefts_dropout(rank: int, case: Case) -> Outcome:
    from dstrain.model.adapters import Adapters

    Adapters._drop_by_rows = lambda *arguments: None  # type: ignore[method-assign]
    return train_in_layout(rank, case)


def test_what_peft_drops_depends_on_the_layout() -> None:
    case = replace(DROPOUT, pipeline=2)
    found = difference(run(2, with_pefts_dropout, case), reference(case.adapter))
    assert found.loss > 100 * FP32_BOUND, found


@pytest.mark.parametrize(
    "case",
    [replace(DROPOUT, pipeline=2, checkpointing=True), *full(replace(DORA, data_parallel=2, zero=3))],
    ids=str,
)
def test_a_training_goes_on_with_what_it_would_have_dropped(case: Case, tmp_path: Path) -> None:
    whole: Any = run(case.world_size, train_in_layout, case)
    half = replace(case, steps=case.steps // 2)
    first: Any = run(case.world_size, train_in_layout, half, str(tmp_path))
    rest: Any = run(case.world_size, train_in_layout, case, None, str(tmp_path))
    for one, begun, continued in zip(whole, first, rest, strict=True):
        assert begun.losses + continued.losses == one.losses
        assert all(value.equal(one.weights[name]) for name, value in continued.weights.items())
