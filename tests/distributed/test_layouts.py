"""Every layout trains the same model as a plain Hugging Face loop in one process (fp32, to 1e-5)."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from tests.distributed.compare import difference
from tests.distributed.training import Case, Outcome, train_in_layout, train_in_plain_loop
from tests.distributed.workers import run

# Learning rates at which each optimizer visibly trains in ten steps.
LR = {"adamw": 1e-3, "sgd": 0.3}
LAYOUTS = [(1, 1), (4, 1), (2, 2), (1, 4)]  # (pipeline, data parallel)


@cache
def reference(case: Case) -> Outcome:
    [outcome] = run(1, train_in_plain_loop, case)
    assert outcome.losses[-1] < outcome.losses[0], "the yardstick itself does not learn"
    assert not case.clip or max(outcome.norms) > case.clip, "clipping does not bite"
    return outcome


def cases() -> list[Case]:
    found = []
    for optimizer in ("adamw", "sgd"):
        for tied in (True, False):
            base = Case(optimizer=optimizer, lr=LR[optimizer], tied=tied)
            found += [
                replace(base, zero=zero, pipeline=pipeline, data_parallel=replicas)
                for zero in (0, 1, 2)
                for pipeline, replicas in LAYOUTS
            ]
            found.append(replace(base, zero=3, data_parallel=2))
    return found


@pytest.mark.parametrize("case", cases(), ids=str)
def test_layout_equals_the_plain_loop(case: Case) -> None:
    found = difference(run(case.world_size, train_in_layout, case), reference(case.one_process()))
    assert found.worst < 1e-5, found
