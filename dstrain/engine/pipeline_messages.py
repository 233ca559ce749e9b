"""What the ranks of a pipeline send each other: nobody waits for a send, and receives are posted ahead.

The order of the messages from one rank to another is that of the sender's actions in the schedule's table, which both
know. What a stage hands on is announced once for each shape of a micro-batch; after that a message is tensors alone.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import distributed

from dstrain.planning.schedules.messages import sends_under_way
from dstrain.planning.schedules.table import FORWARD, Action, Message, Table

AHEAD = 2
"""Receives that a rank has posted of each other rank beyond the one that it waits for."""
_ANNOUNCED = 64
"""Numbers of an announcement."""
_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32)


class TensorSpec(NamedTuple):
    """A tensor of a message; ``trained``: whether a gradient is sent back for it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    trained: bool


Specs = tuple[TensorSpec, ...]
Key = tuple[Any, ...]
"""What the shapes of a message follow from: the chunk that makes it, the shape of the micro-batch, and the mode."""

PostedTensor = tuple[Any, torch.Tensor]
"""A tensor that is under way, with torch's handle to wait for it."""


def specs_of(tensors: Sequence[torch.Tensor]) -> Specs:
    return tuple(TensorSpec(tuple(one.shape), one.dtype, one.requires_grad) for one in tensors)


def with_gradients(specs: Specs) -> Specs:
    """Those of what comes back for a message: a gradient for each tensor that has one."""
    return tuple(spec for spec in specs if spec.trained)


def to_numbers(specs: Specs) -> list[int]:
    """An announcement of specs."""
    numbers = [len(specs)]
    for shape, dtype, trained in specs:
        numbers += [_TYPES.index(dtype), int(trained), len(shape), *shape]
    return numbers + [0] * (_ANNOUNCED - len(numbers))


def from_numbers(numbers: Sequence[int]) -> Specs:
    specs, rest = [], iter(numbers)
    for _ in range(next(rest)):
        dtype, trained = _TYPES[next(rest)], bool(next(rest))
        shape = tuple(next(rest) for _ in range(next(rest)))
        specs.append(TensorSpec(shape, dtype, trained))
    return tuple(specs)


class Mailbox:
    """A rank's messages. Each step `begin`s with its table and `end`s when all have arrived.

    Args:
        rank: of the pipeline, the stage.
        global_rank: of a rank of the pipeline.
        device: where tensors arrive.
        upward, downward: process groups for messages to higher and to lower ranks. NCCL carries out the messages
            between two ranks in the order in which they are posted, so that each direction needs its own; with gloo
            both may be the same, or None.
    """

    def __init__(
        self,
        rank: int,
        global_rank: Callable[[int], int],
        device: torch.device,
        upward: Any = None,
        downward: Any = None,
    ) -> None:
        self.rank = rank
        self.device = device
        self._global_rank = global_rank
        self._groups = upward, downward
        self._specs: dict[Key, Specs] = {}
        self._announced: set[Key] = set()
        self._begin_empty()

    def _begin_empty(self) -> None:
        self._expected: dict[int, deque[Message]] = {}
        self._arriving: dict[Action, list[PostedTensor]] = {}
        self._posted: dict[int, int] = {}
        self._under_way: dict[int, deque[list[PostedTensor]]] = defaultdict(deque)

    table: Table
    """Of the step that runs."""

    def begin(self, table: Table, key_of: Callable[[int], Key]) -> None:
        """Post the first receives of a step.

        Args:
            key_of: what tells one shape of a micro-batch from another, by its number.
        """
        self._begin_empty()
        self.table = table
        self._key_of = key_of
        self._most_under_way = sends_under_way(table)
        for other in range(len(table.ranks)):
            expected = deque(message for message in table.sent_by(other) if message.target == self.rank)
            if expected:
                self._expected[other] = expected
                self._posted[other] = 0
                self._post_ahead(other)

    def end(self) -> None:
        """Wait until all that was sent has arrived."""
        for under_way in self._under_way.values():
            for posted in under_way:
                _wait(posted)
        self._begin_empty()

    def specs(self, action: Action) -> Specs:
        """Of what an action of another rank sends to this one. Waits for the announcement, the first time."""
        message = self.table.message_of(action)
        assert message is not None
        while (specs := self._specs_of(message)) is None:
            self._post(message.source)
        return specs

    def send(self, action: Action, tensors: Sequence[torch.Tensor]) -> None:
        """Begin to send what an action has made, which must not be written to any more.

        Where too many sends to a rank are under way then, the oldest must have arrived. It has, unless the other rank
        is far behind, and what was sent can go. Receives are posted here too, where nobody waits for this rank.

        Args:
            tensors: may lie anyhow in memory. Gradients of nothing are no message.
        """
        message = self.table.message_of(action)
        assert message is not None
        posted = self._announce(message, tensors) if action.kind == FORWARD else []
        posted += [self.post_send(message, tensor.detach().contiguous()) for tensor in tensors]
        under_way = self._under_way[message.target]
        under_way.append(posted)
        while len(under_way) > self._most_under_way:
            _wait(under_way.popleft())
        for source in self._expected:
            self._post_ahead(source)

    def take(self, action: Action) -> list[torch.Tensor]:
        """What an action of another rank has sent to this one, in new memory. Waits for it."""
        message = self.table.message_of(action)
        assert message is not None and message.target == self.rank
        while action not in self._arriving:
            self._post(message.source)
        arrived = self._arriving.pop(action)
        self._posted[message.source] -= 1
        _wait(arrived)
        return [tensor for _, tensor in arrived]

    def _post_ahead(self, source: int) -> None:
        """Post receives as long as their shapes are known."""
        while self._posted[source] < AHEAD and self._expected[source]:
            if self._specs_of(self._expected[source][0]) is None:
                return
            self._post(source)

    def _post(self, source: int) -> None:
        """Post the next receive from a rank. Waits for the announcement of a shape that was not there before."""
        message = self._expected[source].popleft()
        specs = self._specs_of(message)
        if specs is None:
            specs = self._specs[self._key(message.action)] = self._receive_announcement(message)
        self._arriving[message.action] = [self._irecv(message, spec) for spec in specs]
        self._posted[source] += 1

    def _key(self, action: Action) -> Key:
        return action.chunk, *self._key_of(action.micro_batch)

    def _specs_of(self, message: Message) -> Specs | None:
        action = message.action
        if action.kind == FORWARD:
            return self._specs.get(self._key(action))
        handed_on = self._specs.get(self._key(action._replace(chunk=action.chunk - 1)))
        return None if handed_on is None else with_gradients(handed_on)

    def _announce(self, message: Message, tensors: Sequence[torch.Tensor]) -> list[PostedTensor]:
        """Say what the tensors of such a message are, if it is the first one."""
        key, specs = self._key(message.action), specs_of(tensors)
        if key in self._announced:
            if self._specs[key] != specs:
                raise RuntimeError(f"a stage hands on {specs}, and before it was {self._specs[key]}")
            return []
        self._announced.add(key)
        self._specs[key] = specs
        numbers = torch.tensor(to_numbers(specs), dtype=torch.int64, device=self.device)
        return [self.post_send(message, numbers)]

    def _receive_announcement(self, message: Message) -> Specs:
        work, numbers = self._irecv(message, TensorSpec((_ANNOUNCED,), torch.int64, False))
        work.wait()
        return from_numbers(numbers.tolist())

    def _group(self, message: Message) -> Any:
        return self._groups[message.target < message.source]

    def post_send(self, message: Message, tensor: torch.Tensor) -> PostedTensor:
        """Begin to send one tensor of a message."""
        to = self._global_rank(message.target)
        return distributed.isend(tensor, to, group=self._group(message)), tensor

    def _irecv(self, message: Message, spec: TensorSpec) -> PostedTensor:
        tensor = torch.empty(spec.shape, dtype=spec.dtype, device=self.device)
        source = self._global_rank(message.source)
        return distributed.irecv(tensor, source, group=self._group(message)), tensor


def _wait(posted: Sequence[PostedTensor]) -> None:
    for work, _ in posted:
        work.wait()
