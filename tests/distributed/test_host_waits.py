"""How often a training step has its host wait for the device: a budget for each layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.distributed.test_injuries import micro_batches
from tests.support.distributed.training import Case, build_case_engine
from tests.support.distributed.workers import run

SHORT = Case(layers=2, accumulation=4)
BUDGETS = [  # of waits in a step
    (replace(SHORT, zero=0), 1),  # loss and norm
    (replace(SHORT, zero=0, pipeline=2), 1),
    (replace(SHORT, zero=1, data_parallel=2, precision="bf16"), 1),
    (replace(SHORT, zero=1, pipeline=2, precision="bf16", checkpointing=True), 1),
    (replace(SHORT, zero=2, data_parallel=2, precision="bf16", checkpointing=True), 1),
    (replace(SHORT, zero=1, pipeline=2, precision="bf16", schedule="dualpipev", accumulation=8), 1),
    (replace(SHORT, zero=3, data_parallel=2, precision="bf16"), 2),  # DeepSpeed's check as well
    # In a pipeline the replicas compare the order of their parameters in each micro-batch.
    (replace(SHORT, zero=3, pipeline=2, precision="bf16"), 2 + 2 * SHORT.accumulation),
    (replace(SHORT, zero=1, data_parallel=2, precision="fp16"), 2),  # DeepSpeed's check for overflow as well
]


def train(rank: int, case: Case) -> tuple[dict[str, int], int, list[float]]:
    """The waits of the third step, how many of them come after the optimizer has begun, and the losses."""
    from dstrain.engine import deepspeed_patches, rank_engines
    from dstrain.model.document_lengths import document_lengths
    from tests.support.host_waits import HostWaits

    engine, plan = build_case_engine(case)
    waits = HostWaits()
    for module in (rank_engines, deepspeed_patches):
        module.on_host = waits.on_host  # type: ignore[attr-defined]
    replica = plan.layout.replica(rank)
    steps = [
        [
            replace(one, documents=document_lengths(one.position_ids))
            for one in micro_batches(case, replica, step)
        ]
        for step in (1, 2, 3)
    ]
    # ZeRO-3 notes the order of parameters in the first ones.
    losses = [engine.train_batch(step, case.lr).loss for step in steps[:2]]
    waits.seen.clear()
    before: list[int] = []
    updating(engine, lambda: before.append(sum(waits.seen.values())))
    with waits:
        losses.append(engine.train_batch(steps[2], case.lr).loss)
    return dict(waits.seen), sum(waits.seen.values()) - before[0], losses


def updating(engine: Any, told: Callable[[], None]) -> None:
    """Tell when the optimizer's part of a step begins."""
    optimizer = engine.engine.basic_optimizer
    original = optimizer.step

    def step(*args: Any, **kwargs: Any) -> Any:
        told()
        return original(*args, **kwargs)

    optimizer.step = step


@pytest.mark.parametrize(("case", "budget"), BUDGETS, ids=str)
def test_a_step_waits_for_its_device_no_more_often(case: Case, budget: int) -> None:
    for seen, behind, losses in run(case.world_size, train, case):
        assert 1 <= sum(seen.values()) <= budget, seen
        assert behind == 0, seen
        assert losses[2] < losses[0]
