"""Makes a schedule's table for any costs: each rank takes what it can begin first, within its memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from dstrain.planning.schedules.simulate import Costs
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
class Rules:
    """How a rank chooses among what it could do.

    Attributes:
        split: the backward passes are run in two parts, and the weights' part fills what would be a gap.
        patience: the rank leaves the gradients of the weights for something that others wait for, if that can begin
            within this fraction of their time.
        forward_first: of what can begin at the same time a forward pass goes before a backward pass.
        ahead: for one chunk a rank: the last rank begins so many forward passes before the backward pass of the first
            of them, and each rank before it one more; 0: as many as its memory holds.
    """

    split: bool = True
    patience: float = 0.0
    forward_first: bool = False
    ahead: int = 0


def list_schedule(
    placement: Sequence[int],
    micro_batches: int,
    costs: Costs,
    memory: Sequence[float],
    rules: Rules = Rules(),
) -> Table:
    """A table for chunks on these ranks.

    Args:
        placement: the rank of each chunk.
        memory: the most that each rank may keep at a time, in the unit of ``costs.kept``.

    Raises:
        TableError: a rank's memory is too small for one micro-batch.
    """
    work = _Work(tuple(placement), micro_batches, costs, tuple(memory), rules)
    while not work.done:
        work.take_next()
    return Table(tuple(map(tuple, work.actions)), work.placement, micro_batches)


@dataclass
class _Work:
    """What has been scheduled so far.

    Attributes:
        begun: how many micro-batches each chunk has had of each kind of action.
        ends: when each action ends.
    """

    placement: tuple[int, ...]
    micro_batches: int
    costs: Costs
    memory: tuple[float, ...]
    rules: Rules
    actions: list[list[Action]] = field(init=False)
    clocks: list[float] = field(init=False)
    held: list[float] = field(init=False)
    begun: list[dict[str, int]] = field(init=False)
    ends: dict[Action, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ranks = max(self.placement) + 1
        self.actions = [[] for _ in range(ranks)]
        self.clocks, self.held = [0.0] * ranks, [0.0] * ranks
        self.begun = [dict.fromkeys((FORWARD, INPUTS, WEIGHTS), 0) for _ in self.placement]
        self.chunks = [held_by(self.placement, rank) for rank in range(ranks)]
        self.needed = [self._for_later(chunk) for chunk in range(len(self.placement))]
        self.left = 3 * len(self.placement) * self.micro_batches

    @property
    def done(self) -> bool:
        return self.left == 0

    def take_next(self) -> None:
        """Schedule the action that begins first of all."""
        found = [best for rank in range(len(self.actions)) if (best := self._best(rank)) is not None]
        if not found:
            raise TableError("the memory of a rank is too small for this schedule")
        begin, _, _, _, action = min(found)
        rank = self.placement[action.chunk]
        self.ends[action] = self.clocks[rank] = begin + self.costs.time(action)
        self.held[rank] += self.costs.memory(action)
        self.actions[rank].append(action)
        counts = self.begun[action.chunk]
        if action.kind == BACKWARD:
            counts[INPUTS] += 1
            counts[WEIGHTS] += 1
            self.left -= 2
        else:
            counts[action.kind] += 1
            self.left -= 1

    def _best(self, rank: int) -> tuple[float, int, int, int, Action] | None:
        """Of a rank: when it begins, how soon it is wanted, and what it is."""
        wanted = [c for c in self._passes(rank) if c is not None]
        first = min(wanted, default=None)
        weights = self._weights(rank)
        if weights is None:
            return first
        if first is None:
            return weights
        patience = self.rules.patience * self.costs.time(weights[-1])
        return first if first[0] <= self.clocks[rank] + patience else weights

    def _passes(self, rank: int) -> list[tuple[float, int, int, int, Action] | None]:
        """The next forward pass and the next backward pass of each chunk, where they can be had."""
        found: list[tuple[float, int, int, int, Action] | None] = []
        for chunk in self.chunks[rank]:
            counts = self.begun[chunk]
            number = counts[INPUTS]
            if number < counts[FORWARD]:
                kind = INPUTS if self.rules.split else BACKWARD
                last = chunk == len(self.placement) - 1
                needed = (
                    self.ends.get(Action(FORWARD, chunk, number)) if last else self._after(chunk + 1, number)
                )
                found.append(self._at(rank, needed, chunk + 1, 0, Action(kind, chunk, number)))
            number = counts[FORWARD]
            if number < self.micro_batches and number - counts[INPUTS] < self._ahead(rank):
                action = Action(FORWARD, chunk, number)
                kept = self.held[rank] + self.costs.memory(action) + self.needed[chunk]
                if kept <= self.memory[rank] + 1e-9:
                    needed = 0.0 if chunk == 0 else self.ends.get(Action(FORWARD, chunk - 1, number))
                    order = -1 if self.rules.forward_first else 1
                    found.append(self._at(rank, needed, chunk - 1, order, action))
        return found

    def _ahead(self, rank: int) -> int:
        return self.rules.ahead + len(self.actions) - 1 - rank if self.rules.ahead else self.micro_batches

    def _after(self, chunk: int, number: int) -> float | None:
        """When the gradients of a chunk's inputs are there."""
        kind = INPUTS if self.rules.split else BACKWARD
        return self.ends.get(Action(kind, chunk, number))

    def _at(
        self, rank: int, needed: float | None, other: int, order: int, action: Action
    ) -> tuple[float, int, int, int, Action] | None:
        if needed is None:
            return None
        apart = 0 <= other < len(self.placement) and self.placement[other] != rank
        begin = max(self.clocks[rank], needed + self.costs.message * apart)
        return begin, order, action.micro_batch, -action.chunk, action

    def _weights(self, rank: int) -> tuple[float, int, int, int, Action] | None:
        waiting = [
            (self.begun[chunk][WEIGHTS], -chunk)
            for chunk in self.chunks[rank]
            if self.rules.split and self.begun[chunk][WEIGHTS] < self.begun[chunk][INPUTS]
        ]
        if not waiting:
            return None
        number, chunk = min(waiting)
        return self.clocks[rank], 2, number, chunk, Action(WEIGHTS, -chunk, number)

    def _for_later(self, chunk: int) -> float:
        """Memory that a forward pass must leave free: for the same rank's later chunks, without which none ends."""
        mine = self.chunks[self.placement[chunk]]
        return sum(self.costs.memory(Action(FORWARD, later, 0)) for later in mine if later > chunk)
