"""The plan's traffic against the bytes that ranks really send in a step; its bubbles against DeepSpeed's schedules."""

from __future__ import annotations

from typing import Any

import pytest

from dstrain.estimate.time import stages_waiting
from dstrain.estimate.traffic import stage_traffic
from dstrain.planning.model_shape import ModelShape
from tests.support.distributed.counting import Sent, bytes_of_a_step
from tests.support.distributed.simulation import waiting_of
from tests.support.distributed.training import Case, make_case_plan, measured, model_config
from tests.support.distributed.workers import run

# Each kind of traffic once, and each formula with more than one micro-batch, replica and stage.
CASES = [
    Case(zero=0, data_parallel=4, accumulation=2),
    Case(zero=1, data_parallel=2, precision="bf16"),
    Case(zero=2, data_parallel=4, precision="bf16", accumulation=2),
    Case(zero=3, data_parallel=2, precision="bf16"),
    Case(zero=3, data_parallel=2, accumulation=2, freeze=("model.layers.0.*",)),
    Case(zero=0, pipeline=2, data_parallel=2),
    Case(zero=1, pipeline=3, precision="bf16"),
    Case(zero=2, pipeline=2, data_parallel=2, precision="bf16"),
    Case(zero=3, pipeline=2, data_parallel=2, precision="bf16"),
    Case(zero=1, pipeline=2, data_parallel=2, schedule="dualpipev"),
]


# Which operations carry what the plan speaks of.
KINDS = {
    "all_reduce": ("gradients", "tied weights"),
    "reduce_scatter_tensor": ("gradients",),
    "all_gather_into_tensor": ("weights",),
    "send": ("activations", "activation gradients"),
}
# ZeRO-3 releases all that it has gathered, and looks no further than a few parameters ahead.
NO_PREFETCH = {"stage3_prefetch_bucket_size": 1, "stage3_max_live_parameters": 1}
# Losses, norms and flags: a few numbers each.
SCALARS = 64


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bytes_of_a_step(case: Case) -> None:
    hold_to_the_plan(case, {})


@pytest.mark.parametrize(
    ("case", "keys"),
    [
        (Case(zero=1, data_parallel=2), {"use_multi_rank_bucket_allreduce": False}),
        (Case(zero=3, data_parallel=2, accumulation=2), {"stage3_max_reuse_distance": 1} | NO_PREFETCH),
    ],
    ids=["zero1-reduced-to-owners", "zero3-gathered-twice"],
)
def test_bytes_with_other_keys_of_the_user_s(case: Case, keys: dict[str, Any]) -> None:
    hold_to_the_plan(case, keys)


def hold_to_the_plan(case: Case, keys: dict[str, Any]) -> None:
    """Every rank's bytes against the plan's, with other values of some ``zero_optimization`` keys."""
    found = run(case.world_size, bytes_of_a_step, case, keys)
    plan = make_case_plan(case)
    plan.deepspeed["zero_optimization"].update(keys)
    shape = ModelShape.from_record(measured(model_config(case)))
    for rank, sent in enumerate(found):
        stage = plan.layout.stage(rank)
        expected = {
            part.what: part.bytes
            for part in stage_traffic(plan.run_config, shape, plan.layout, plan.batch, stage, plan.deepspeed)
        }
        assert_near(sent, expected, case)


def assert_near(sent: Sent, expected: dict[str, int], case: Case) -> None:
    """Within 5 %, operation by operation."""
    reduction = "reduce_scatter_tensor" if case.zero == 3 else "all_reduce"
    wanted = dict.fromkeys(KINDS, 0)
    for what, size in expected.items():
        wanted[reduction if what == "gradients" else next(k for k in KINDS if what in KINDS[k])] += size
    for operation, size in wanted.items():
        names = (operation, "reduce") if operation == "all_reduce" else (operation,)
        real = sum(count for (name, _), count in sent.items() if name in names)
        assert real == pytest.approx(size, rel=0.05, abs=SCALARS), (operation, sent, expected)
    assert {name for name, _ in sent} <= {*KINDS, "broadcast", "reduce", "all_gather"}
    # What ranks tell each other as JSON, in bytes and their number: with ZeRO-3 the order of the parameters, once.
    told = {kind: count for (name, kind), count in sent.items() if name == "all_gather"}
    assert told.keys() <= {"uint8", "int64"}
    assert sum(told.values()) < 4096


@pytest.mark.parametrize("schedule", ["1f1b", "dualpipev"])
def test_waiting_of_deepspeed_s_schedules(schedule: str) -> None:
    """(stages, micro-batches, backward pass over forward pass)"""
    shapes = [(2, 4, 2.0), (3, 9, 2.0), (4, 8, 3.0), (4, 24, 2.0), (8, 64, 3.0)]
    [waited] = run(1, waiting_of, schedule, shapes)
    assert waited == pytest.approx(
        [stages_waiting(pipeline, schedule, backward) for pipeline, _, backward in shapes]
    )
