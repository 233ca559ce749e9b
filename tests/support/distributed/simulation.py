"""DeepSpeed's pipeline schedules, played through with a clock: no tensors, only who waits for whom."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

Channel = tuple[str, int, int, int]
"""Activations or gradients, of which phase, from which rank to which."""


def waiting_of(rank: int, schedule: str, shapes: list[tuple[int, int, float]]) -> list[float]:
    """For how many micro-batches' time a stage waits in a step: even stages, messages that take no time.

    Args:
        rank: of this process, which plays all ranks of the schedule.
        shapes: stages, micro-batches, and the time of a backward pass where a forward pass takes 1. A rank of
            dualpipev has two spans of half as much.
    """
    from deepspeed.runtime.pipe.schedule import DualPipeVSchedule, TrainSchedule

    made = DualPipeVSchedule if schedule == "dualpipev" else TrainSchedule
    found = []
    for pipeline, micro_batches, backward in shapes:
        ranks = [
            _Rank(stage, made(micro_batches=micro_batches, stages=pipeline, stage_id=stage), backward)
            for stage in range(pipeline)
        ]
        ideal = micro_batches * (1 + backward)
        found.append((_play(ranks) - ideal) / (1 + backward))
    return found


def _play(ranks: list[_Rank]) -> float:
    """The time at which the last of them is through. Raises AssertionError where they wait for each other for good."""
    posts: dict[tuple[Channel, bool], list[float]] = defaultdict(list)
    while any(not each.done for each in ranks):
        came_on = [each.go_on(posts) for each in ranks]
        if not any(came_on):
            raise AssertionError("the schedule waits for itself")
    return max(each.clock for each in ranks)


class _Rank:
    """One rank's instructions, its clock, and the messages that it waits for."""

    def __init__(self, stage: int, schedule: Any, backward: float) -> None:
        self.stage = stage
        self.instructions = [instruction for step in schedule.steps() for instruction in step]
        self.folded = type(schedule).__name__ == "DualPipeVSchedule"
        spans = 2 if self.folded else 1
        self.durations = {"ForwardPass": 1 / spans, "BackwardPass": backward / spans}
        self.clock = 0.0
        self.next = 0
        self.queued: list[tuple[Channel, bool]] = []
        self.waiting: list[tuple[Channel, bool, int]] = []

    @property
    def done(self) -> bool:
        return self.next == len(self.instructions) and not self.waiting

    def go_on(self, posts: dict[tuple[Channel, bool], list[float]]) -> bool:
        """As far as it can without others; whether it came any further."""
        moved = False
        while not self.done:
            if self.waiting and not self._met(posts):
                return moved
            moved = True
            if self.next == len(self.instructions):
                return True
            instruction = self.instructions[self.next]
            self.next += 1
            name = type(instruction).__name__
            self.clock += self.durations.get(name, 0.0)
            if name.startswith(("Send", "Recv")):
                self.queued.append(self._message(name, getattr(instruction, "phase", 0)))
            # dualpipev starts its messages together; 1f1b each by itself, and both wait until they are through.
            if self.queued and (name == "CommitP2P" or not self.folded):
                for channel, sends in self.queued:
                    posts[channel, sends].append(self.clock)
                    self.waiting.append((channel, sends, len(posts[channel, sends]) - 1))
                self.queued = []
        return moved

    def _met(self, posts: dict[tuple[Channel, bool], list[float]]) -> bool:
        """Whether the other ends of all messages are there; then the clock shows when the last one came."""
        times = [posts[channel, not sends] for channel, sends, _ in self.waiting]
        if any(len(others) <= number for others, (_, _, number) in zip(times, self.waiting, strict=True)):
            return False
        met = [others[number] for others, (_, _, number) in zip(times, self.waiting, strict=True)]
        self.clock = max(self.clock, *met)
        self.waiting = []
        return True

    def _message(self, name: str, phase: int) -> tuple[Channel, bool]:
        """The channel of a message, and whether this rank sends."""
        what, sends = name[4:], name.startswith("Send")
        onward = 1 if phase == 0 else -1
        direction = onward if what == "Activation" else -onward
        here, there = (self.stage, self.stage + direction) if sends else (self.stage - direction, self.stage)
        return (what, phase, here, there), sends
