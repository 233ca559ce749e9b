"""Covering sets of cases: every pair, and every triple, of choices that can be met together is met in some case."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product

from dstrain.planning.checks import refusal_of
from tests.support.distributed.training import Case

FACTORS: dict[str, tuple] = {
    "zero": (0, 1, 2, 3),
    "pipeline": (1, 2, 4),
    "data_parallel": (1, 2, 4),
    "precision": ("fp32", "bf16"),
    "optimizer": ("adamw", "sgd"),
    "clip": (0.5, 0.0),
    "tied": (True, False),
    "accumulation": (1, 4, 8),
}
WORKERS = 4


def candidates() -> list[Case]:
    """The full product, less what four workers can't hold and what the plan refuses."""
    cases = [Case(**dict(zip(FACTORS, values, strict=True))) for values in product(*FACTORS.values())]
    return [
        case
        for case in cases
        if case.world_size <= WORKERS
        and refusal_of(zero=case.zero, pipeline=case.pipeline, precision=case.precision) is None
    ]


def tuples_of(case: Case, strength: int) -> set[tuple]:
    """All choices of ``strength`` factors that a case makes."""
    chosen = [(name, getattr(case, name)) for name in FACTORS]
    return set(combinations(chosen, strength))


def covering_set(cases: list[Case], strength: int, start: Sequence[Case] = ()) -> list[Case]:
    """Cases that meet, with those of ``start``, all that can be met. Deterministic.

    Greedy: always the case that meets most of what is not met yet; what it costs counts a little.
    """
    wanted = {case: tuples_of(case, strength) for case in cases}
    missing = set().union(*wanted.values()).difference(*(wanted[case] for case in start))
    spreads = {case.in_one_process() for case in start}
    found: list[Case] = []

    def worth(case: Case) -> float:
        # The fifth root: that there are few of them saves more than that each is cheap.
        return len(wanted[case] & missing) / cost(case, spreads) ** 0.2

    while missing:
        best = max(cases, key=worth)
        found.append(best)
        missing -= wanted[best]
        spreads.add(best.in_one_process())
    return found


def cost(case: Case, spreads: set[Case]) -> float:
    """Seconds of one processor, about. ``spreads``: trainings in 16 bits whose bounds are known (`compare.bound`)."""
    passes = case.steps * case.world_size * case.accumulation
    bound = 0 if case.precision == "fp32" or case.in_one_process() in spreads else 11
    return passes * (0.055 if case.zero == 3 else 0.022) + case.world_size * 0.5 + bound
