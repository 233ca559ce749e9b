"""A covering set of cases: every triple of choices that can be met together is met in some cell."""

from __future__ import annotations

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
STRENGTH = 3
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


def covering_set(cases: list[Case], strength: int) -> list[Case]:
    """Greedy: always the case that meets most of what is not met yet. Deterministic."""
    wanted = {case: tuples_of(case, strength) for case in cases}
    missing = set().union(*wanted.values())
    found = []
    while missing:
        best = max(cases, key=lambda case: len(wanted[case] & missing))
        found.append(best)
        missing -= wanted[best]
    return found
