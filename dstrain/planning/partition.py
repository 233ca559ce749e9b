"""Partitions layers into chunks: minimises the slowest stage's time within the memory limit.

With 1f1b a stage is a chunk. With dualpipev a stage is two chunks, the first and the last, the second and the last
but one, ...: what counts is their sum.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

from dstrain.estimate.memory import Memory
from dstrain.planning.layout import count_chunks
from dstrain.planning.model_shape import ModelShape

WORDS = ("auto", "parameters", "uniform")
"""The words that ``partition`` may be; else it is the numbers of blocks."""

Farthest = Callable[[int, int], int]
"""For a chunk and its first layer: the end of the longest chunk that fits in memory; ``start`` where none does."""


def cut_by_cost(
    costs: Sequence[float],
    chunks: int,
    farthest: Farthest | None = None,
    beside: Sequence[float] | None = None,
) -> tuple[int, ...] | None:
    """Cut a list of layers into consecutive, non-empty chunks with the least largest cost.

    Among cuts with the same largest cost, the one with the least sum of squares is taken, so that
    the other chunks are even too; among those, the one with the fewest layers in front.

    Args:
        costs: of each layer, any unit; whole numbers below 2^53 are compared exactly.
        chunks: at most ``len(costs)``.
        farthest: what fits; None: everything. A part of what fits must fit.
        beside: what each chunk's stage has to do beside it; None: nothing.

    Returns:
        First layer of each chunk, and ``len(costs)`` at the end; None where no cut fits.

    Source: the ordered partition problem (Skiena, The Algorithm Design Manual, third edition, section 10.7), with
    a search over the largest cost in place of its first table.
    """
    count = len(costs)
    if not 1 <= chunks <= count:
        raise ValueError(f"{count} layers can't fill {chunks} stages")
    total = [0.0]
    for cost in costs:
        total.append(total[-1] + cost)
    beside = beside or [0.0] * chunks

    def ends(limit: float) -> list[list[int]]:
        """For each chunk and first layer, the end of the longest chunk that costs and weighs little enough."""
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
            [min(end, farthest(chunk, start)) for start, end in enumerate(rows[weight])]
            for chunk, weight in enumerate(beside)
        ]

    # The evenest cut under a limit is made of evenest cuts under the same limit, but the least largest cost
    # is not a limit for the layers in front: a heavy chunk behind may excuse one there. So first the limit.
    largest = sorted(
        {b + (high - low) for b in set(beside) for i, low in enumerate(total) for high in total[i:]}
    )
    limit = bisect_left(largest, True, key=lambda limit: _reaches_the_end(ends(limit), count))
    return _evenest(ends(largest[limit]), total) if limit < len(largest) else None


def _reaches_the_end(ends: list[list[int]], count: int) -> bool:
    """Whether chunks that go at most this far, one after the other, can hold all layers."""
    distinct = {id(row): row for row in ends}.values()
    if all(end > start for row in distinct for start, end in enumerate(row)):
        # Any chunk may be one layer long: what can be reached is all that lies before the farthest.
        farthest = 0
        for row in ends:
            farthest = row[farthest] if farthest < count else count
        return farthest == count
    starts = {0}
    for row in ends:
        starts = {end for start in starts if start < count for end in range(start + 1, row[start] + 1)}
    return count in starts


def _evenest(ends: list[list[int]], total: list[float]) -> tuple[int, ...]:
    """The cut with the least sum of squared costs, whose chunks go at most this far."""
    count = len(total) - 1
    # For each first layer: the least sum of the chunks from here on, and where the first of them ends.
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
    """Cut into 2 x ``stages`` chunks for dualpipev, so that the largest sum of a stage's two chunks is small.

    The way out and the way back are cut in turn, each the best one beside the other, until nothing gets better.
    That is rarely worse than the best of all cuts, and never worse than the one with even chunks.

    Args:
        costs: of each layer.
        farthest_beside: what fits, given the stages that are met and the other chunk of each; None: everything.
        begin: the cut to begin with; None: the one with even chunks.

    Returns:
        As `cut_by_cost`; None where no cut was found that fits.
    """
    cut = tuple(begin or cut_by_cost(costs, 2 * stages) or ())

    def leg(first: int, last: int, met: Sequence[int], others: list[range]) -> tuple[int, ...] | None:
        """The best cut of the layers from ``first`` on, with the other chunk of each stage as it is."""
        reach = farthest_beside(met, others) if farthest_beside else None
        found = cut_by_cost(
            costs[first:last],
            stages,
            reach and (lambda chunk, start: reach(chunk, start + first) - first),
            [float(sum(costs[layer] for layer in chunk)) for chunk in others],
        )
        return found and tuple(first + at for at in found)

    while True:
        before = cut
        # Stage s holds chunk s and chunk 2 x stages - 1 - s: each way meets the other one's chunks in reverse.
        chunks = [range(*pair) for pair in pairwise(cut)]
        way_out = leg(0, cut[stages], range(stages), chunks[: stages - 1 : -1])
        cut = (*(way_out or cut[: stages + 1]), *cut[stages + 1 :])
        chunks = [range(*pair) for pair in pairwise(cut)]
        way_back = leg(cut[stages], len(costs), range(stages)[::-1], chunks[stages - 1 :: -1])
        cut = (*cut[:stages], *(way_back or cut[stages:]))
        # The last stage's chunks are adjacent: where one ends and the other begins changes no sum.
        out, back = cut[stages - 1], cut[stages + 1]
        middle = min(range(out + 1, back), key=lambda at: abs(sum(costs[out:at]) - sum(costs[at:back])))
        cut = (*cut[:stages], middle, *cut[stages + 1 :])
        if cut == before:
            return cut if way_back else None


def cut_by_blocks(blocks: Sequence[int]) -> tuple[int, ...]:
    """The cut with so many blocks in each chunk; embedding and head join the first and the last one."""
    cut = [0]
    for number in blocks:
        cut.append(cut[-1] + number)
    return (0, *(at + 1 for at in cut[1:-1]), cut[-1] + 2)


def even_blocks(blocks: int, chunks: int) -> tuple[int, ...]:
    """So many blocks for each chunk that they differ by one at most, the larger ones in front.

    Where there are too few, the first and then the last chunk, which hold embedding and head, go without.
    """
    if blocks < chunks:
        return (0, *[1] * blocks, *[0] * (chunks - blocks - 1))
    return tuple(blocks // chunks + (chunk < blocks % chunks) for chunk in range(chunks))


def blocks_of_chunks(partition: str) -> tuple[int, ...] | None:
    """The numbers in "5,5,5,1"; None where it is not a list of whole numbers."""
    parts = [part.strip() for part in partition.split(",")]
    return tuple(map(int, parts)) if all(part.isascii() and part.isdigit() for part in parts) else None


def partition_of(cut: Sequence[int]) -> str:
    """A layout's cut as ``partition`` has it: the number of blocks of each chunk. One chunk: ``auto``."""
    if len(cut) == 2:
        return "auto"
    blocks = [end - start for start, end in pairwise(cut)]
    return ",".join(map(str, [blocks[0] - 1, *blocks[1:-1], blocks[-1] - 1]))


def cut_as_asked(partition: str, shape: ModelShape, pipeline: int, schedule: str) -> tuple[int, ...] | None:
    """The cut that ``partition`` asks for, checked before; None for ``auto``."""
    chunks = count_chunks(pipeline, schedule)
    if chunks == 1:
        return (0, len(shape.layers))
    if partition == "parameters":
        parameters = [layer.parameters for layer in shape.layers]
        return cut_folded(parameters, pipeline) if chunks > pipeline else cut_by_cost(parameters, chunks)
    if partition == "uniform":
        return cut_by_blocks(even_blocks(len(shape.layers) - 2, chunks))
    blocks = blocks_of_chunks(partition)
    return None if blocks is None else cut_by_blocks(blocks)


def cut_by_time(
    times: Sequence[float], pipeline: int, schedule: str, memory: Memory, limit: float | None
) -> tuple[int, ...]:
    """The cut with the least time of the slowest stage, among those that fit; among all where none fits.

    Args:
        times: of each layer.
        limit: bytes that a stage may need; None: any number.
    """

    def cut(limit: float | None, begin: Sequence[int] | None = None) -> tuple[int, ...] | None:
        if count_chunks(pipeline, schedule) == pipeline:
            fits = None if limit is None else _farthest(memory, range(pipeline), limit, [range(0)] * pipeline)
            return cut_by_cost(times, pipeline, fits)
        if limit is None:
            return cut_folded(times, pipeline)

        return cut_folded(
            times, pipeline, lambda stages, others: _farthest(memory, stages, limit, others), begin
        )

    fastest = cut(None)
    assert fastest is not None
    if limit is None or max(stage_bytes(fastest, pipeline, schedule, memory)) <= limit:
        return fastest
    lightest = None
    if count_chunks(pipeline, schedule) > pipeline:
        layers = zip(memory.states, memory.once, memory.kept, strict=True)
        lightest = cut_folded([s + o + memory.in_flight[0] * k for s, o, k in layers], pipeline)
    # Where none is found: the fastest. What does not fit by a good deal would not run with the lightest cut either.
    return cut(limit, lightest) or fastest


def stage_bytes(cut: Sequence[int], pipeline: int, schedule: str, memory: Memory) -> tuple[int, ...]:
    """Bytes that each stage of a cut needs."""
    folded = count_chunks(pipeline, schedule) > pipeline
    chunks = [range(cut[index], cut[index + 1]) for index in range(len(cut) - 1)]
    return tuple(
        memory.of_stage(stage, (chunks[stage], chunks[-1 - stage]) if folded else (chunks[stage],))
        for stage in range(pipeline)
    )


def _farthest(memory: Memory, stages: Sequence[int], limit: float, others: Sequence[range]) -> Farthest:
    """What fits on each stage beside the layers that it holds already."""
    fixed = [0, *accumulate(state + once for state, once in zip(memory.states, memory.once, strict=True))]
    kept = [0, *accumulate(memory.kept)]
    count = len(memory.kept)
    ends = []
    for stage, other in zip(stages, others, strict=True):
        flying = memory.in_flight[stage]
        room = limit - memory.of_stage(stage, (range(0), other) if other else (range(0),))
        row, end = [], 0
        for start in range(count):
            end = max(end, start)
            while (
                end < count and fixed[end + 1] - fixed[start] + flying * (kept[end + 1] - kept[start]) <= room
            ):
                end += 1
            row.append(end)
        ends.append(row)
    return lambda chunk, start: ends[chunk][start]
