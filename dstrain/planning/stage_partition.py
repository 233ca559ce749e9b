"""The partition of a run: as set by ``partition``, or by estimated time within the memory limit."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from dstrain.estimate.memory import Memory
from dstrain.planning.layout import count_chunks
from dstrain.planning.model_shape import ModelShape
from dstrain.planning.partition import (
    Farthest,
    blocks_of_chunks,
    cut_by_blocks,
    cut_by_cost,
    cut_folded,
    even_blocks,
)


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
