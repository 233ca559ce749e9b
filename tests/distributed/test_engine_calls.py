"""Each method of an engine may follow each other one: what one leaves behind is no hindrance for the next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from tests.distributed.test_injuries import micro_batches
from tests.support.distributed.training import Case, build_case_engine, make_case_plan
from tests.support.distributed.workers import run

SHORT = Case(layers=4)
# ZeRO-3 keeps all weights of a small model gathered after an evaluation. Of a large one it keeps what fits, and has
# begun to gather more, for a backward pass that does not come.
LARGE = 10_000
CASES = [
    (replace(SHORT, zero=3, data_parallel=2, precision="bf16"), None),
    (replace(SHORT, zero=3, data_parallel=2, precision="bf16"), LARGE),
    (replace(SHORT, zero=3, pipeline=2, data_parallel=2), LARGE),
    (replace(SHORT, zero=2, pipeline=2), None),
]


def each_after_each(names: list[str]) -> list[str]:
    """A sequence in which each name comes after each, itself too: a walk over all edges of the complete graph."""
    left = {name: list(names) for name in names}
    walk, path = [], [names[0]]
    while path:
        if left[path[-1]]:
            path.append(left[path[-1]].pop())
        else:
            walk.append(path.pop())
    return walk[::-1]


def call(rank: int, case: Case, live: int | None, folder: str) -> list[str]:
    """The calls that were made.

    Args:
        live: elements that ZeRO-3 keeps gathered; None: as planned.
    """
    plan = make_case_plan(case)
    if live is not None:
        limits = {"stage3_max_live_parameters": live, "stage3_max_reuse_distance": live}
        plan.deepspeed["zero_optimization"] |= limits
    engine, plan = build_case_engine(case, plan=plan)
    replica = plan.layout.replica(rank)
    batches = micro_batches(case, replica, 1)
    saved = iter(Path(folder) / str(number) for number in range(100))

    def save() -> None:
        place = next(saved)
        place.mkdir(exist_ok=True)
        engine.save(place, {})

    calls: dict[str, Callable[[], object]] = {
        "train_batch": lambda: engine.train_batch(batches, case.lr),
        "eval_loss": lambda: engine.eval_loss(batches[: engine.fewest_micro_batches]),
        "next_token_logits": lambda: engine.next_token_logits(batches[0], 0, 1),
        "check_replicas": engine.check_replicas,
        "weights": lambda: list(engine.weights()),
        "save": save,
    }
    made = []
    for name in ["train_batch", "train_batch", *each_after_each(list(calls))]:
        made.append(name)
        try:
            calls[name]()
        except Exception as error:
            raise AssertionError(f"{name} fails after {made[:-1][-1:]}") from error
    return made


@pytest.mark.parametrize(("case", "live"), CASES, ids=str)
def test_each_method_may_follow_each(case: Case, live: int | None, tmp_path: Path) -> None:
    for made in run(case.world_size, call, case, live, str(tmp_path)):
        pairs = set(pairwise(made))
        assert len(pairs) == len(set(made)) ** 2
