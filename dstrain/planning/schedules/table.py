"""A pipeline schedule as a table: for each rank the actions that it carries out, one after the other.

What is sent follows from the table: each forward pass hands its chunk's output to the rank of the next chunk, each
backward pass the gradient of its input to the rank of the chunk before. A message from one rank to another goes off
when the action that makes it is done, so the order of messages is that of the sender's actions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

FORWARD, BACKWARD, INPUTS, WEIGHTS = "F", "B", "I", "W"
"""Kinds of actions. A backward pass is run at once (B), or for the gradients of the inputs (I) and later for those of
the weights (W)."""


class Action(NamedTuple):
    """One pass of a micro-batch through a chunk of layers; both are counted from 0."""

    kind: str
    chunk: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.kind}{self.micro_batch}" + (f" of chunk {self.chunk}" if self.chunk else "")


class Message(NamedTuple):
    """What an action sends to another rank: a chunk's outputs (F) or the gradients of its inputs (B)."""

    action: Action
    source: int
    target: int


class TableError(ValueError):
    """A table that can't be carried out: what is missing, doubled, or waits for itself."""


@dataclass(frozen=True)
class Table:
    """Attributes:
    ranks: the actions of each rank, in their order.
    placement: the rank that holds each chunk, from the model's first layers to its last.
    micro_batches: of a step.
    """

    ranks: tuple[tuple[Action, ...], ...]
    placement: tuple[int, ...]
    micro_batches: int

    def check(self) -> None:
        """Raise TableError where an action is missing, doubled, on a wrong rank, or comes before what it needs."""
        seen: dict[Action, int] = {}
        for rank, actions in enumerate(self.ranks):
            for action in actions:
                if action.kind not in (FORWARD, BACKWARD, INPUTS, WEIGHTS):
                    raise TableError(f"unknown kind of action {action.kind!r}")
                if not (0 <= action.chunk < len(self.placement)) or self.placement[action.chunk] != rank:
                    raise TableError(f"rank {rank} does not hold the chunk of {action}")
                if not 0 <= action.micro_batch < self.micro_batches:
                    raise TableError(f"{action}: there are {self.micro_batches} micro-batches")
                if action in seen:
                    raise TableError(f"{action} stands twice in the table")
                for needed in _needed_here(action):
                    if needed not in seen:
                        raise TableError(f"{action} comes before {needed}")
                seen[action] = rank
        for chunk in range(len(self.placement)):
            for number in range(self.micro_batches):
                whole = Action(BACKWARD, chunk, number) in seen
                weights = Action(WEIGHTS, chunk, number) in seen
                if whole and Action(INPUTS, chunk, number) in seen:
                    raise TableError(f"{Action(BACKWARD, chunk, number)} and {Action(INPUTS, chunk, number)}")
                if not whole and not weights:
                    missing = WEIGHTS if Action(INPUTS, chunk, number) in seen else BACKWARD
                    raise TableError(f"{Action(missing, chunk, number)} is missing")

    @cached_property
    def splits_backward(self) -> bool:
        """Whether some backward pass is run in two parts."""
        return any(action.kind == WEIGHTS for actions in self.ranks for action in actions)

    def waits_for(self, action: Action) -> Action | None:
        """The action on this or another rank whose result this one takes in, if it takes in any.

        The gradients of a chunk's inputs come from a B or an I, whichever the table has: the answer is the one that
        it has.
        """
        if action.kind == FORWARD:
            return Action(FORWARD, action.chunk - 1, action.micro_batch) if action.chunk else None
        if action.kind == WEIGHTS:
            return Action(INPUTS, action.chunk, action.micro_batch)
        if action.chunk == len(self.placement) - 1:
            return Action(FORWARD, action.chunk, action.micro_batch)
        later = action.chunk + 1
        kind = BACKWARD if Action(BACKWARD, later, action.micro_batch) in self._all else INPUTS
        return Action(kind, later, action.micro_batch)

    @cached_property
    def _all(self) -> frozenset[Action]:
        return frozenset(action for actions in self.ranks for action in actions)

    def message_of(self, action: Action) -> Message | None:
        """What an action sends to another rank; None where the next chunk lies on the same one, or there is none."""
        if action.kind == WEIGHTS:
            return None
        other = action.chunk + (1 if action.kind == FORWARD else -1)
        if not 0 <= other < len(self.placement):
            return None
        source, target = self.placement[action.chunk], self.placement[other]
        return Message(action, source, target) if source != target else None

    def sent_by(self, rank: int) -> Iterator[Message]:
        """The messages of a rank, in the order in which they go off."""
        for action in self.ranks[rank]:
            message = self.message_of(action)
            if message is not None:
                yield message


def _needed_here(action: Action) -> tuple[Action, ...]:
    """What must come before an action on the same rank."""
    if action.kind in (BACKWARD, INPUTS):
        return (Action(FORWARD, action.chunk, action.micro_batch),)
    return (Action(INPUTS, action.chunk, action.micro_batch),) if action.kind == WEIGHTS else ()


def in_a_row(ranks: int) -> tuple[int, ...]:
    """The placement of one chunk a rank."""
    return tuple(range(ranks))


def in_a_circle(ranks: int, chunks: int) -> tuple[int, ...]:
    """The placement of ``chunks`` chunks a rank that go around: rank r has chunks r, r + ranks, ..."""
    return tuple(range(ranks)) * chunks


def in_a_v(ranks: int) -> tuple[int, ...]:
    """The placement of two chunks a rank, out and back: rank r has chunks r and 2 x ranks - 1 - r."""
    return (*range(ranks), *reversed(range(ranks)))


def held_by(placement: Sequence[int], rank: int) -> tuple[int, ...]:
    """The chunks of a rank, the model's first layers first."""
    return tuple(chunk for chunk, holder in enumerate(placement) if holder == rank)
