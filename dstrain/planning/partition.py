"""Where the layers are cut into spans: the slowest stage as fast as can be, among the cuts that fit in memory.

With 1f1b a stage is a span. With dualpipev a stage is two spans, the first and the last, the second and the last
but one, ...: what counts is their sum.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import pairwise

WORDS = ("auto", "parameters", "uniform")
"""The words that ``partition`` may be; else it is the numbers of blocks."""

Farthest = Callable[[int, int], int]
"""For a span and its first layer: the end of the longest span that fits in memory; ``start`` where none does."""


def cut_by_cost(
    costs: Sequence[float],
    spans: int,
    farthest: Farthest | None = None,
    beside: Sequence[float] | None = None,
) -> tuple[int, ...] | None:
    """Cut a list of layers into consecutive, non-empty spans with the least largest cost.

    Among cuts with the same largest cost, the one with the least sum of squares is taken, so that
    the other spans are even too; among those, the one with the fewest layers in front.

    Args:
        costs: of each layer, any unit; whole numbers below 2^53 are compared exactly.
        spans: at most ``len(costs)``.
        farthest: what fits; None: everything. A part of what fits must fit.
        beside: what each span's stage has to do beside it; None: nothing.

    Returns:
        First layer of each span, and ``len(costs)`` at the end; None where no cut fits.

    Source: the ordered partition problem (Skiena, The Algorithm Design Manual, third edition, section 10.7), with
    a search over the largest cost in place of its first table.
    """
    count = len(costs)
    if not 1 <= spans <= count:
        raise ValueError(f"{count} layers can't fill {spans} stages")
    total = [0.0]
    for cost in costs:
        total.append(total[-1] + cost)
    beside = beside or [0.0] * spans

    def ends(limit: float) -> list[list[int]]:
        """For each span and first layer, the end of the longest span that costs and weighs little enough."""
        rows: dict[float, list[int]] = {}
        for weight in set(beside):
            row, end = [], 0
            for start in range(count):
                end = max(end, start)
                while end < count and weight + (total[end + 1] - total[start]) <= limit:
                    end += 1
                row.append(end)
            rows[weight] = row
        if farthest is None:
            return [rows[weight] for weight in beside]
        return [
            [min(end, farthest(span, start)) for start, end in enumerate(rows[weight])]
            for span, weight in enumerate(beside)
        ]

    # The evenest cut under a limit is made of evenest cuts under the same limit, but the least largest cost
    # is not a limit for the layers in front: a heavy span behind may excuse one there. So first the limit.
    largest = sorted(
        {b + (high - low) for b in set(beside) for i, low in enumerate(total) for high in total[i:]}
    )
    limit = bisect_left(largest, True, key=lambda limit: _reaches_the_end(ends(limit), count))
    return _evenest(ends(largest[limit]), total) if limit < len(largest) else None


def _reaches_the_end(ends: list[list[int]], count: int) -> bool:
    """Whether spans that go at most this far, one after the other, can hold all layers."""
    distinct = {id(row): row for row in ends}.values()
    if all(end > start for row in distinct for start, end in enumerate(row)):
        # Any span may be one layer long: what can be reached is all that lies before the farthest.
        farthest = 0
        for row in ends:
            farthest = row[farthest] if farthest < count else count
        return farthest == count
    starts = {0}
    for row in ends:
        starts = {end for start in starts if start < count for end in range(start + 1, row[start] + 1)}
    return count in starts


def _evenest(ends: list[list[int]], total: list[float]) -> tuple[int, ...]:
    """The cut with the least sum of squared costs, whose spans go at most this far."""
    count = len(total) - 1
    # For each first layer: the least sum of the spans from here on, and where the first of them ends.
    best: list[float | None] = [*[None] * count, 0.0]
    choices = []
    for row in reversed(ends):
        sums: list[float | None] = [None] * (count + 1)
        chosen = [0] * (count + 1)
        for start in range(count):
            for end in range(start + 1, row[start] + 1):
                behind, before = best[end], sums[start]
                if behind is None:
                    continue
                candidate = (total[end] - total[start]) ** 2 + behind
                if before is None or candidate < before:
                    sums[start], chosen[start] = candidate, end
        best = sums
        choices.append(chosen)
    cut = [0]
    for chosen in reversed(choices):
        cut.append(chosen[cut[-1]])
    return tuple(cut)


def cut_folded(
    costs: Sequence[float],
    stages: int,
    farthest_beside: Callable[[Sequence[int], Sequence[range]], Farthest] | None = None,
    begin: Sequence[int] | None = None,
) -> tuple[int, ...] | None:
    """Cut into 2 x ``stages`` spans for dualpipev, so that the largest sum of a stage's two spans is small.

    The way out and the way back are cut in turn, each the best one beside the other, until nothing gets better.
    That is rarely worse than the best of all cuts, and never worse than the one with even spans.

    Args:
        costs: of each layer.
        farthest_beside: what fits, given the stages that are met and the other span of each; None: everything.
        begin: the cut to begin with; None: the one with even spans.

    Returns:
        As `cut_by_cost`; None where no cut was found that fits.
    """
    cut = tuple(begin or cut_by_cost(costs, 2 * stages) or ())

    def leg(first: int, last: int, met: Sequence[int], others: list[range]) -> tuple[int, ...] | None:
        """The best cut of the layers from ``first`` on, with the other span of each stage as it is."""
        reach = farthest_beside(met, others) if farthest_beside else None
        found = cut_by_cost(
            costs[first:last],
            stages,
            reach and (lambda span, start: reach(span, start + first) - first),
            [float(sum(costs[layer] for layer in span)) for span in others],
        )
        return found and tuple(first + at for at in found)

    while True:
        before = cut
        # Stage s holds span s and span 2 x stages - 1 - s: each way meets the other one's spans in reverse.
        spans = [range(*pair) for pair in pairwise(cut)]
        way_out = leg(0, cut[stages], range(stages), spans[: stages - 1 : -1])
        cut = (*(way_out or cut[: stages + 1]), *cut[stages + 1 :])
        spans = [range(*pair) for pair in pairwise(cut)]
        way_back = leg(cut[stages], len(costs), range(stages)[::-1], spans[stages - 1 :: -1])
        cut = (*cut[:stages], *(way_back or cut[stages:]))
        # The last stage's spans are neighbours: where one ends and the other begins changes no sum.
        out, back = cut[stages - 1], cut[stages + 1]
        middle = min(range(out + 1, back), key=lambda at: abs(sum(costs[out:at]) - sum(costs[at:back])))
        cut = (*cut[:stages], middle, *cut[stages + 1 :])
        if cut == before:
            return cut if way_back else None


def cut_by_blocks(blocks: Sequence[int]) -> tuple[int, ...]:
    """The cut with so many blocks in each span; embedding and head join the first and the last one."""
    cut = [0]
    for number in blocks:
        cut.append(cut[-1] + number)
    return (0, *(at + 1 for at in cut[1:-1]), cut[-1] + 2)


def even_blocks(blocks: int, spans: int) -> tuple[int, ...]:
    """So many blocks for each span that they differ by one at most, the larger ones in front.

    Where there are too few, the first and then the last span, which hold embedding and head, go without.
    """
    if blocks < spans:
        return (0, *[1] * blocks, *[0] * (spans - blocks - 1))
    return tuple(blocks // spans + (span < blocks % spans) for span in range(spans))


def blocks_of_spans(partition: str) -> tuple[int, ...] | None:
    """The numbers in "5,5,5,1"; None where it is not a list of whole numbers."""
    parts = [part.strip() for part in partition.split(",")]
    return tuple(map(int, parts)) if all(part.isascii() and part.isdigit() for part in parts) else None


def partition_of(cut: Sequence[int]) -> str:
    """A layout's cut as ``partition`` has it: the number of blocks of each span. One span: ``auto``."""
    if len(cut) == 2:
        return "auto"
    blocks = [end - start for start, end in pairwise(cut)]
    return ",".join(map(str, [blocks[0] - 1, *blocks[1:-1], blocks[-1] - 1]))
