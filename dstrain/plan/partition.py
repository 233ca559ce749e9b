"""Where the layers are cut into stages: the slowest stage as fast as can be."""

from __future__ import annotations

import itertools
from collections.abc import Sequence


def cut_by_cost(costs: Sequence[float], stages: int) -> tuple[int, ...]:
    """Cut a list of layers into consecutive, non-empty stages with the least largest cost.

    Among cuts with the same largest cost, the one with the least sum of squares is taken, so that
    the other stages are even too.

    Args:
        costs: of each layer, any unit.
        stages: at most ``len(costs)``.

    Returns:
        First layer of each stage, and ``len(costs)`` at the end.

    Source: the linear partition problem by dynamic programming (Skiena, The Algorithm Design
    Manual, section 10.7).
    """
    count = len(costs)
    if not 1 <= stages <= count:
        raise ValueError(f"{count} layers can't fill {stages} stages")
    total = [0.0]
    for cost in costs:
        total.append(total[-1] + cost)
    # best[i] = (largest, sum of squares, cut) of the first i layers in the stages so far
    best: list[tuple[float, float, tuple[int, ...]] | None] = [
        (total[i], total[i] ** 2, (0,)) if i else None for i in range(count + 1)
    ]
    for stage in range(1, stages):
        following: list[tuple[float, float, tuple[int, ...]] | None] = [None] * (count + 1)
        for end in range(stage + 1, count + 1):
            for start in range(stage, end):
                before = best[start]
                if before is None:
                    continue
                cost = total[end] - total[start]
                candidate = (max(before[0], cost), before[1] + cost**2, (*before[2], start))
                current = following[end]
                if current is None or candidate < current:
                    following[end] = candidate
        best = following
    last = best[count]
    assert last is not None
    return (*last[2], count)


def imbalance(costs: Sequence[float], cut: Sequence[int]) -> float:
    """Cost of the slowest stage over the mean of all: 1.0 is perfect."""
    stages = [sum(costs[a:b]) for a, b in itertools.pairwise(cut)]
    mean = sum(stages) / len(stages)
    return max(stages) / mean if mean else 1.0
