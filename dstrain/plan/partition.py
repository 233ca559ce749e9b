"""Where the layers are cut into stages: the slowest stage as fast as can be."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence


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

    # Two passes: the evenest cut under a limit is made of evenest cuts under the same limit, but the least
    # largest cost is not a limit for the layers in front: a heavy stage behind may excuse one there.
    def search(largest: float, combine: Callable[[float, float], float]) -> tuple[float, tuple[int, ...]]:
        """The least combined value over all cuts whose stages cost at most ``largest``, and its cut."""
        best: list[tuple[float, tuple[int, ...]] | None] = [(0.0, ()), *[None] * count]
        for stage in range(stages):
            following: list[tuple[float, tuple[int, ...]] | None] = [None] * (count + 1)
            for end in range(stage + 1, count + 1):
                for start in range(stage, end):
                    before = best[start]
                    cost = total[end] - total[start]
                    if before is None or cost > largest:
                        continue
                    candidate = (combine(before[0], cost), (*before[1], start))
                    current = following[end]
                    if current is None or candidate < current:
                        following[end] = candidate
            best = following
        last = best[count]
        assert last is not None
        return last

    limit, _ = search(math.inf, max)
    _, cut = search(limit, lambda before, cost: before + cost**2)
    return (*cut, count)
