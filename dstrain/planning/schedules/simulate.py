"""Plays a schedule's table through with a clock: how long it takes, what it keeps in memory, and whether it ends."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from dstrain.planning.schedules.table import (
    BACKWARD,
    FORWARD,
    INPUTS,
    WEIGHTS,
    Action,
    Table,
    TableError,
    held_by,
)


@dataclass(frozen=True)
class Costs:
    """What the passes of one micro-batch through each chunk take, in any unit of time.

    Attributes:
        forward, inputs, weights: forward pass, gradients of the inputs, gradients of the weights.
        message: from one rank to another; the ranks do not wait for it.
        kept: what a chunk keeps of a micro-batch from its forward pass to the end of its backward pass, in any unit
            of memory.
        kept_for_weights: what it keeps between the two parts of a backward pass.
    """

    forward: tuple[float, ...]
    inputs: tuple[float, ...]
    weights: tuple[float, ...]
    message: float = 0.0
    kept: tuple[float, ...] = ()
    kept_for_weights: tuple[float, ...] = ()

    @classmethod
    def even(cls, chunks: int, *, ranks: int | None = None, message: float = 0.0) -> Costs:
        """One unit of time for each of the three passes of a rank's share of the model, one of memory for it all."""
        each = (ranks or chunks) / chunks
        return cls(
            (each,) * chunks, (each,) * chunks, (each,) * chunks, message, (each,) * chunks, (each,) * chunks
        )

    def time(self, action: Action) -> float:
        forward, inputs, weights = (c[action.chunk] for c in (self.forward, self.inputs, self.weights))
        return {FORWARD: forward, BACKWARD: inputs + weights, INPUTS: inputs, WEIGHTS: weights}[action.kind]

    def memory(self, action: Action) -> float:
        """What it adds to the memory that is kept; less than 0: what it gives back."""
        kept = self.kept[action.chunk] if self.kept else 1.0
        later = self.kept_for_weights[action.chunk] if self.kept_for_weights else kept
        return {FORWARD: kept, BACKWARD: -kept, INPUTS: later - kept, WEIGHTS: -later}[action.kind]


@dataclass(frozen=True)
class Simulation:
    """Attributes:
    spans: when each action of each rank begins and ends.
    total: when the last rank is done.
    peaks: the most memory that each rank keeps at a time.
    """

    spans: tuple[tuple[tuple[float, float], ...], ...]
    total: float
    peaks: tuple[float, ...]

    @property
    def busy(self) -> tuple[float, ...]:
        """How long each rank computes."""
        return tuple(sum(end - begin for begin, end in spans) for spans in self.spans)

    @property
    def bubble(self) -> float:
        """The fraction of the step for which the busiest rank is idle."""
        return 1 - max(self.busy) / self.total if self.total else 0.0


def simulate(table: Table, costs: Costs) -> Simulation:
    """Carry out a table, each rank as soon as it can.

    Raises:
        TableError: the table is not complete, or ranks wait for each other for good.
    """
    table.check()
    ends: dict[Action, float] = {}
    spans: list[list[tuple[float, float]]] = [[] for _ in table.ranks]
    places, clocks = [0] * len(table.ranks), [0.0] * len(table.ranks)
    went_on = True
    while went_on:
        went_on = False
        for rank, actions in enumerate(table.ranks):
            while places[rank] < len(actions):
                action = actions[places[rank]]
                begin = _ready(table, action, ends, costs.message)
                if begin is None:
                    break
                begin = max(begin, clocks[rank])
                clocks[rank] = ends[action] = begin + costs.time(action)
                spans[rank].append((begin, clocks[rank]))
                places[rank] += 1
                went_on = True
    stuck = [r for r, actions in enumerate(table.ranks) if places[r] < len(actions)]
    if stuck:
        waiting = [f"rank {r} for {table.waits_for(table.ranks[r][places[r]])}" for r in stuck]
        raise TableError(f"the ranks wait for each other: {', '.join(waiting)}")
    peaks = tuple(_peak(actions, costs) for actions in table.ranks)
    return Simulation(tuple(map(tuple, spans)), max(clocks, default=0.0), peaks)


def _ready(table: Table, action: Action, ends: dict[Action, float], message: float) -> float | None:
    """When what an action takes in is there; None: nobody knows yet."""
    needed = table.waits_for(action)
    if needed is None:
        return 0.0
    if needed not in ends:
        return None
    apart = table.placement[needed.chunk] != table.placement[action.chunk]
    return ends[needed] + (message if apart else 0.0)


def _peak(actions: Sequence[Action], costs: Costs) -> float:
    held = most = 0.0
    for action in actions:
        held += costs.memory(action)
        most = max(most, held)
    return most


def lower_bound(
    placement: Sequence[int], micro_batches: int, costs: Costs, memory: Sequence[float] | None = None
) -> float:
    """A time that no table for these chunks stays below.

    A rank begins no earlier than the first micro-batch gets to it, and then has all its work to do. The last
    micro-batch to begin passes through all chunks, forward and back. And what a rank keeps of a micro-batch it keeps
    for as long as that is on its way at least, so that its memory bounds how many it can take in a time.

    Args:
        memory: the most that each rank may keep at a time; None: any.
    """
    chunks = range(len(placement))
    apart = [costs.message * (a != b) for a, b in itertools.pairwise(placement)]
    reached = [sum(costs.forward[:chunk]) + sum(apart[:chunk]) for chunk in chunks]
    bounds = []
    for rank in set(placement):
        mine = held_by(placement, rank)
        work = sum(costs.forward[c] + costs.inputs[c] + costs.weights[c] for c in mine)
        bounds.append(reached[mine[0]] + micro_batches * work)
        if memory is not None:
            kept = 0.0
            for c in mine:
                on_its_way = sum(costs.forward[c:]) + sum(costs.inputs[c:]) + 2 * sum(apart[c:])
                between = costs.memory(Action(FORWARD, c, 0)) + costs.memory(Action(INPUTS, c, 0))
                kept += costs.memory(Action(FORWARD, c, 0)) * on_its_way + between * costs.weights[c]
            bounds.append(reached[mine[0]] + micro_batches * kept / memory[rank])
    through = sum(costs.forward) + sum(costs.inputs) + 2 * sum(apart) + costs.weights[0]
    bounds.append((micro_batches - 1) * costs.forward[0] + through)
    return max(bounds)
