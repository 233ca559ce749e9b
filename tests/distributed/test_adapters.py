"""Adapters trained in a layout are those that PEFT trains in one process, in a plain loop (`yardsticks`).

Loss and norm of each step, the validation loss, and each weight of the adapters at the end.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, product
from typing import Any

import pytest

from dstrain.planning.checks import refusal_of
from tests.support.distributed.compare import assert_equal
from tests.support.distributed.training import ADAPTERS, Case, train_in_layout
from tests.support.distributed.workers import run
from tests.support.sampling import full, heavy

PEFTS = [name for name, section in ADAPTERS.items() if "dropout" not in section and "base" not in section]
LORA = Case(adapter="lora", zero=1)
FACTORS: dict[str, tuple[Any, ...]] = {
    "zero": (0, 1, 2, 3),
    "pipeline": (1, 2, 4),
    "data_parallel": (1, 2),
    "precision": ("fp32", "bf16"),
    "adapter": tuple(PEFTS),
    "tied": (True, False),
    "checkpointing": (True, False),
    "schedule": ("1f1b", "dualpipev"),
}


def candidates() -> list[Case]:
    """The full product, less what four workers can't hold and what the plan refuses."""
    cases = [
        replace(LORA, **dict(zip(FACTORS, values, strict=True))) for values in product(*FACTORS.values())
    ]
    return [
        replace(case, layers=2 * case.pipeline, accumulation=2 * case.pipeline)
        if case.schedule == "dualpipev"
        else case
        for case in cases
        if case.world_size <= 4
        and refusal_of(
            zero=case.zero, pipeline=case.pipeline, precision=case.precision, schedule=case.schedule
        )
        is None
    ]


def choices(case: Case) -> set[tuple[Any, ...]]:
    chosen = [(name, getattr(case, name)) for name in FACTORS]
    return set(combinations(chosen, 2))


def covering() -> list[Case]:
    """Cases that meet every pair of choices that can be met. Deterministic; small ones first."""
    cases = sorted(candidates(), key=lambda case: (case.world_size, case.precision != "fp32", case.zero == 3))
    wanted = {case: choices(case) for case in cases}
    missing = set().union(*wanted.values())
    found = []
    while missing:
        best = max(cases, key=lambda case: len(wanted[case] & missing))
        found.append(best)
        missing -= wanted[best]
    return found


COVERING = covering()
SOME = [case for case in COVERING if case.precision == "fp32"][:6]
OTHERS = [
    replace(LORA, experts=4, pipeline=2),
    replace(LORA, experts=4, zero=3, checkpointing=True),
    replace(LORA, adapter="full", optimizer="sgd", pipeline=2, data_parallel=2),
    replace(LORA, loss_chunk=16, pipeline=2, adapter="outer"),
    replace(LORA, longrope=True, pipeline=2, adapter="dora"),
    replace(LORA, precision="fp16", zero=2, data_parallel=2),
    *(replace(LORA, adapter=name, zero=2, pipeline=2, data_parallel=2) for name in PEFTS),
    *(replace(LORA, adapter=name, zero=3, data_parallel=2, checkpointing=True) for name in PEFTS),
]
LATER = [case for case in dict.fromkeys([*COVERING, *OTHERS]) if case not in SOME]


@pytest.mark.parametrize("case", SOME, ids=str)
def test_layout_trains_what_peft_trains(case: Case) -> None:
    assert_equal(case, run(case.world_size, train_in_layout, case))


@pytest.mark.parametrize(
    "case", [*heavy(*LATER[::8]), *full(*(c for c in LATER if c not in LATER[::8]))], ids=str
)
def test_every_pair_of_choices(case: Case) -> None:
    assert_equal(case, run(case.world_size, train_in_layout, case))


def test_there_are_enough() -> None:
    assert len(SOME) + len(LATER) >= 40
