"""The named schedules, as tables for even costs, and the fastest table for any costs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

from dstrain.planning.schedules.list_scheduler import Rules, list_schedule
from dstrain.planning.schedules.simulate import Costs, lower_bound, simulate
from dstrain.planning.schedules.table import (
    BACKWARD,
    FORWARD,
    INPUTS,
    WEIGHTS,
    Action,
    Table,
    TableError,
    held_by,
    in_a_circle,
    in_a_row,
    in_a_v,
)

_ENOUGH = 1.02
"""A table that takes no longer than this over the lower bound is not improved on."""


def one_forward_one_backward(ranks: int, micro_batches: int) -> Table:
    """1F1B: each rank keeps at most as many micro-batches as there are ranks from it to the last.

    Source: Narayanan et al. 2021, Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM,
    section 2.2.
    """
    rows = []
    for rank in range(ranks):
        forward = (Action(FORWARD, rank, number) for number in range(micro_batches))
        actions = list(itertools.islice(forward, ranks - 1 - rank))
        for number in range(micro_batches):
            actions += itertools.islice(forward, 1)
            actions.append(Action(BACKWARD, rank, number))
        rows.append(tuple(actions))
    return Table(tuple(rows), in_a_row(ranks), micro_batches)


def zero_bubble_h1(ranks: int, micro_batches: int) -> Table:
    """ZB-H1: 1F1B with the gradients of the weights put off, by r micro-batches on rank r.

    So each rank keeps as many micro-batches as 1F1B's first one, and the bubble is a third of 1F1B's.

    Source: Qi et al. 2023, Zero Bubble Pipeline Parallelism (arXiv 2401.10241), section 2.1.
    """
    rows = []
    for rank in range(ranks):
        forward = (Action(FORWARD, rank, number) for number in range(micro_batches))
        weights = (Action(WEIGHTS, rank, number) for number in range(micro_batches))
        actions = list(itertools.islice(forward, ranks - rank))
        for number in range(micro_batches):
            actions.append(Action(INPUTS, rank, number))
            if number >= rank:
                actions += itertools.islice(weights, 1)
            actions += itertools.islice(forward, 1)
        rows.append((*actions, *weights))
    return Table(tuple(rows), in_a_row(ranks), micro_batches)


def forward_only(placement: Sequence[int], micro_batches: int) -> Table:
    """An evaluation: each micro-batch through all chunks of a rank as it comes. It has no backward passes to check."""
    rows = [
        tuple(
            Action(FORWARD, chunk, number)
            for number in range(micro_batches)
            for chunk in held_by(placement, rank)
        )
        for rank in range(max(placement) + 1)
    ]
    return Table(tuple(rows), tuple(placement), micro_batches)


def interleaved(ranks: int, micro_batches: int, chunks: int = 2) -> Table:
    """Interleaved 1F1B: ``chunks`` chunks a rank, which go around.

    Source: Narayanan et al. 2021, as above.

    Raises:
        TableError: the micro-batches are no multiple of the ranks.
    """
    if micro_batches % ranks:
        raise TableError(f"{micro_batches} micro-batches are no multiple of {ranks} ranks")
    placement = in_a_circle(ranks, chunks)
    passes = [
        (turn, group + number)
        for group in range(0, micro_batches, ranks)
        for turn in range(chunks)
        for number in range(ranks)
    ]
    rows = []
    for rank in range(ranks):
        forward = (Action(FORWARD, turn * ranks + rank, number) for turn, number in passes)
        first = 2 * (ranks - rank - 1) + (chunks - 1) * ranks
        actions = list(itertools.islice(forward, first))
        for turn, number in passes:
            actions += itertools.islice(forward, 1)
            actions.append(Action(BACKWARD, (chunks - 1 - turn) * ranks + rank, number))
        rows.append(tuple(actions))
    return Table(tuple(rows), placement, micro_batches)


def zero_bubble_v(ranks: int, micro_batches: int) -> Table:
    """ZB-V: two chunks a rank, out and back, with the gradients of the weights put off, in the memory of 1F1B.

    Source of the idea: Qi et al. 2024, Pipeline Parallelism with Controllable Memory (arXiv 2405.15362), section 4.
    The table is made by the list scheduler.
    """
    costs = Costs.even(2 * ranks, ranks=ranks)
    return list_schedule(in_a_v(ranks), micro_batches, costs, [float(ranks)] * ranks)


def fastest_table(
    placement: Sequence[int],
    micro_batches: int,
    costs: Costs,
    memory: Sequence[float],
    *,
    split: bool = True,
) -> Table:
    """The fastest of the named tables for this placement and of the list scheduler's, by simulation.

    Args:
        memory: the most that each rank may keep at a time, in the unit of ``costs.kept``.
        split: whether backward passes may be run in two parts.

    Raises:
        TableError: the memory holds no table.
    """
    least = lower_bound(placement, micro_batches, costs, memory)
    best: tuple[float, Table] | None = None
    named = list(_named(placement, micro_batches, split=split))
    for number, table in enumerate(
        itertools.chain(named, _listed(placement, micro_batches, costs, memory, split))
    ):
        found = simulate(table, costs)
        if any(peak > most + 1e-9 for peak, most in zip(found.peaks, memory, strict=True)):
            continue
        if best is None or found.total < best[0] - 1e-9:
            best = found.total, table
        if number >= len(named) - 1 and best[0] <= least * _ENOUGH:
            break
    if best is None:
        raise TableError("the memory of a rank is too small for every schedule")
    return best[1]


def _named(placement: Sequence[int], micro_batches: int, *, split: bool) -> Iterator[Table]:
    """The named tables for this placement."""
    ranks = max(placement) + 1
    chunks = len(placement) // ranks
    if tuple(placement) == in_a_row(ranks):
        yield one_forward_one_backward(ranks, micro_batches)
        if split:
            yield zero_bubble_h1(ranks, micro_batches)
    elif tuple(placement) == in_a_circle(ranks, chunks) and micro_batches % ranks == 0:
        yield interleaved(ranks, micro_batches, chunks)
    elif tuple(placement) == in_a_v(ranks) and split:
        yield zero_bubble_v(ranks, micro_batches)


def _listed(
    placement: Sequence[int], micro_batches: int, costs: Costs, memory: Sequence[float], split: bool
) -> Iterator[Table]:
    """The list scheduler's, by several rules."""
    row = tuple(placement) == in_a_row(max(placement) + 1)
    for divided, ahead in itertools.product((True, False) if split else (False,), (1, 0, 2) if row else (0,)):
        for forward_first, patience in itertools.product((True, False), (0.0, 0.3, 0.6, 1.0)):
            if patience and not divided:
                continue
            rules = Rules(divided, patience, forward_first, ahead)
            # A table for messages of another speed may be the better one for these.
            for factor in (1, 0, 3) if costs.message else (1,):
                others = replace(costs, message=costs.message * factor)
                yield from _made(placement, micro_batches, others, memory, rules)


def _made(
    placement: Sequence[int], micro_batches: int, costs: Costs, memory: Sequence[float], rules: Rules
) -> Iterator[Table]:
    """One, or none where the memory does not hold it."""
    try:
        yield list_schedule(placement, micro_batches, costs, memory, rules)
    except TableError:
        return
