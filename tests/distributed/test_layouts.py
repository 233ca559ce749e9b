"""Every layout that the plan accepts trains the same model as a plain Hugging Face loop in one process.

The yardstick is not dstrain's (`yardsticks`); bounds are in `compare`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dstrain.launch.devices import has_async_io
from tests.support.distributed.compare import assert_equal, difference, reference
from tests.support.distributed.covering import candidates, covering_set, tuples_of
from tests.support.distributed.training import Case, train_in_layout
from tests.support.distributed.workers import run
from tests.support.distributed.yardsticks import train_in_ddp
from tests.support.sampling import full, heavy
from tools.layouts_page import markdown, rows

PAIRS = covering_set(candidates(), 2)
# The first of those that cover every three choices: they meet most of them. `test_full_product` meets all.
TRIPLES = covering_set(candidates(), 3, PAIRS)[:12]
COVERING = PAIRS + TRIPLES

ZERO_BUBBLE = covering_set(
    [
        case
        for case in (replace(case, schedule="zb-h1") for case in candidates() if case.pipeline > 1)
        if case.zero < 3
    ],
    2,
)
# Recomputed blocks, the router loss of experts, and a loss in chunks go through other code when gradients are put off.
PUT_OFF = [
    Case(zero=1, pipeline=2, schedule="zb-h1", checkpointing=True),
    Case(zero=1, pipeline=3, schedule="zb-h1", experts=4),
    Case(zero=2, pipeline=2, schedule="zb-h1", loss_chunk=24, precision="bf16"),
    Case(zero=1, pipeline=2, schedule="zb-h1", offload="cpu"),
    Case(zero=1, pipeline=2, schedule="zb-h1", adapter="lora"),
    Case(zero=1, pipeline=2, schedule="zb-h1", precision="fp16"),
]


SOME_OF_ZERO_BUBBLE = ZERO_BUBBLE[::3]
MORE_OF_ZERO_BUBBLE = [case for case in ZERO_BUBBLE if case not in SOME_OF_ZERO_BUBBLE]


def accepted_rows() -> list[Case]:
    """A case for each accepted row of docs/layouts.md that the covering set does not meet."""
    met = {(c.zero, c.pipeline > 1, c.precision, c.schedule, c.offload) for c in COVERING}
    found = []
    for row in rows():
        key = (row.zero, row.pipeline > 1, row.precision, row.schedule, row.offload)
        if row.refusal is None and row.offload != "nvme" and key not in met:
            found.append(
                Case(
                    zero=row.zero,
                    pipeline=row.pipeline,
                    data_parallel=2,
                    precision=row.precision,
                    schedule=row.schedule,
                    offload=row.offload,
                )
            )
    return found


@pytest.mark.parametrize("case", PAIRS, ids=str)
def test_every_pair_of_choices(case: Case) -> None:
    assert_equal(case, run(case.world_size, train_in_layout, case))


@pytest.mark.parametrize(
    "case",
    [*PUT_OFF, *heavy(*ZERO_BUBBLE[::3]), *full(*(c for c in ZERO_BUBBLE if c not in ZERO_BUBBLE[::3]))],
    ids=str,
)
def test_gradients_of_weights_that_are_put_off(case: Case) -> None:
    assert_equal(case, run(case.world_size, train_in_layout, case))


@pytest.mark.heavy
@pytest.mark.parametrize("case", TRIPLES, ids=str)
def test_most_of_three_choices(case: Case) -> None:
    assert_equal(case, run(case.world_size, train_in_layout, case))


@pytest.mark.heavy
@pytest.mark.parametrize("case", accepted_rows(), ids=str)
def test_accepted_row_of_the_layout_table(case: Case) -> None:
    assert_equal(case, run(case.world_size, train_in_layout, case))


@pytest.mark.full
@pytest.mark.parametrize("case", candidates(), ids=str)
def test_full_product(case: Case) -> None:
    case = replace(case, steps=20)
    assert_equal(case, run(case.world_size, train_in_layout, case))


@pytest.mark.heavy
@pytest.mark.timeout(1200)  # DeepSpeed compiles its disk operator first, which takes minutes
@pytest.mark.skipif(
    not has_async_io(), reason="libaio is missing: --offload nvme is refused here, and NOT TESTED"
)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_optimizer_states_on_disk(precision: str, tmp_path: Path) -> None:
    case = Case(zero=3, data_parallel=2, precision=precision, offload="nvme", nvme_path=str(tmp_path))
    assert_equal(replace(case, nvme_path=""), run(2, train_in_layout, case, timeout=1100))


@pytest.mark.parametrize(("strength", "cases", "share"), [(2, PAIRS, 1), (3, COVERING, 0.9)])
def test_combinations_are_met(strength: int, cases: list[Case], share: float) -> None:
    every = set().union(*(tuples_of(case, strength) for case in candidates()))
    assert len(set().union(*(tuples_of(case, strength) for case in cases))) >= share * len(every)


def test_there_are_enough() -> None:
    assert len(COVERING) + len(accepted_rows()) >= 60


def test_layout_page_is_current(repository: Path) -> None:
    page = (repository / "docs" / "layouts.md").read_text(encoding="utf-8")
    assert page == markdown(), "run `make docs`"


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_data_parallel_equals_ddp_and_gradient_accumulation(optimizer: str) -> None:
    """The essay's first point: map, all-reduce, and every replica ends with the same model."""
    case = Case(zero=1, data_parallel=4, accumulation=2, optimizer=optimizer)
    in_ddp = run(4, train_in_ddp, case)
    assert difference(in_ddp, reference(case.in_one_process())).loss < 1e-5
    found = difference(run(4, train_in_layout, case), in_ddp[0])
    assert max(found.loss, found.norm, found.weights, found.validation) < 1e-5, found
