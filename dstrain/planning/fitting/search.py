"""Finds the fastest layouts that fit, without examining most candidates in detail.

Candidates wait in a queue under a time that they can't beat. The one with the least is looked at more closely each
time: its memory with the fastest cut, its time, and where it does not fit a slower cut. Whatever comes out
of the queue with its own time is faster than all that are left in it.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace

from dstrain.config.loader import ResolvedConfig
from dstrain.errors import DstrainError
from dstrain.estimate.device import Device
from dstrain.estimate.time import StepTime
from dstrain.planning.fitting.candidates import Candidate, find_candidates
from dstrain.planning.fitting.scores import Scores
from dstrain.planning.layout import Layout
from dstrain.planning.layout_names import LayoutChoice
from dstrain.planning.model_shape import ModelShape
from dstrain.planning.plan import Machines

NEAR = 1.02
"""Times that differ by less than this factor count as equal: the simpler layout is taken."""

PARTS = {
    "overhead": "launches and latencies",
    "bubble": "bubble",
    "pipeline": "communication between stages",
    "data_parallel": "communication between replicas",
    "optimizer": "updating weights",
}
"""What a step spends its time on beside computing: fields of `StepTime`, and their names."""

NOTABLE = 0.1
"""A part of the step that is smaller does not bind."""


@dataclass(frozen=True)
class Scored:
    """A candidate with its numbers.

    Attributes:
        memory: bytes on a rank of the fullest stage; on CPUs those of all ranks of a host.
        held_back: a faster choice of micro-batch or recomputation for the same layout did not fit.
    """

    candidate: Candidate
    layout: Layout
    time: StepTime
    memory: int
    held_back: bool = False

    @property
    def seconds(self) -> float:
        return self.time.total

    @property
    def binds(self) -> str:
        """What keeps it from being faster: memory, or the largest part of a step that is not computing."""
        parts = {what: getattr(self.time, name) / self.time.total for name, what in PARTS.items()}
        largest = max(parts, key=lambda what: parts[what])
        if parts[largest] < NOTABLE:
            largest, parts[largest] = "computing", self.time.compute / self.time.total
        return f"{'memory; ' if self.held_back else ''}{largest} {parts[largest]:.0%}"


@dataclass(frozen=True)
class Fit:
    """What was found.

    Attributes:
        best: the fastest layouts that fit, each with its best micro-batch and recomputation, the one to take first.
            Where none fits: those that come nearest.
        fits: whether they fit.
        limit: bytes of a device, or of a host of CPUs, that may be filled; None: not known, then everything fits.
        looked_at: how many candidates there were.
        fallen: how many of them fell, for each reason.
        timed: how many were looked at closely.
    """

    best: tuple[Scored, ...]
    fits: bool
    limit: float | None
    looked_at: int
    fallen: dict[str, int]
    timed: int


def fit(
    resolved: ResolvedConfig, shape: ModelShape, machines: Machines, device: Device, *, wanted: int = 6
) -> Fit:
    """The best ``wanted`` layouts for this model on these machines, whose slots are counted.

    Raises:
        DstrainError: not one candidate is accepted.
    """
    found = find_candidates(resolved, shape, machines.hosts, device_is_host=machines.accelerator == "cpu")
    looked_at = len(found.accepted) + sum(found.refused.values())
    if not found.accepted:
        reason = found.refused.most_common(1)
        raise DstrainError(
            f"none of {looked_at} layouts can be trained" + (f": {reason[0][0]}" if reason else ""),
            where="--fit",
            hint="leave more of --zero, --pipeline, --data-parallel, --micro-batch, --schedule and --offload open",
        )
    scores = Scores(resolved, shape, machines, device)
    fallen = Counter(found.refused)
    queue = _Queue(found.accepted, scores)
    fitting: list[Scored] = []
    layouts: set[LayoutChoice] = set()
    enough = float("inf")
    for scored in queue.in_order():
        if scored.seconds > enough:
            break
        fitting.append(scored)
        layouts.add(replace(scored.candidate.layout, offload="none"))
        if len(layouts) == wanted:
            enough = min(enough, NEAR * scored.seconds)
    fallen["slower, not examined in detail"] += len(found.accepted) - len(queue.too_large) - len(fitting)
    best = choose(fitting, wanted) if fitting else nearest(queue.nearest, scores, wanted)
    fallen["out of memory"] += len(queue.too_large) - (0 if fitting else len(best))
    fallen["slower, examined in detail"] += len(fitting) - len(best) if fitting else 0
    return Fit(
        best=tuple(best),
        fits=bool(fitting),
        limit=scores.limit,
        looked_at=looked_at,
        fallen={reason: number for reason, number in fallen.most_common() if number},
        timed=scores.timed,
    )


def choose(fitting: Sequence[Scored], wanted: int) -> list[Scored]:
    """The best of each layout: the fastest first, but of those that are all but equal the simplest.

    What is offloaded without need is left out: beside the same layout without offload it has nothing to say.
    """
    left = sorted(fitting, key=lambda scored: scored.seconds)
    chosen: list[Scored] = []
    while left and len(chosen) < wanted:
        near = [scored for scored in left if scored.seconds <= NEAR * left[0].seconds]
        simplest = min(near, key=lambda scored: (scored.candidate.simplicity, scored.seconds))
        chosen.append(simplest)
        layout = simplest.candidate.layout
        said = (layout, replace(layout, offload="cpu"), replace(layout, offload="nvme"))
        left = [scored for scored in left if scored.candidate.layout not in said]
    return chosen


def nearest(needed: Sequence[tuple[Candidate, Layout, int]], scores: Scores, wanted: int) -> list[Scored]:
    """Where nothing fits: the best of those layouts that need least.

    Args:
        needed: candidates with their bytes.
    """
    least: dict[LayoutChoice, Scored] = {}
    for candidate, layout, memory in sorted(needed, key=lambda one: (one[2], one[0].simplicity)):
        if candidate.layout not in least and len(least) < wanted:
            least[candidate.layout] = Scored(candidate, layout, scores.time(candidate, layout), memory)
    return list(least.values())


class _Queue:
    """Candidates under the least time that each can take."""

    def __init__(self, candidates: Sequence[Candidate], scores: Scores) -> None:
        self._scores = scores
        self.too_large: list[Candidate] = []
        # What was found of them, but of those that need more than one here for sure.
        self.nearest: list[tuple[Candidate, Layout, int]] = []
        # The smallest micro-batch that does not fit; a larger one of the same kind needs no less.
        self._overfull: dict[Hashable, int] = {}
        # (time, ties in the order of coming, candidate, what is known of it)
        self._heap: list[tuple[float, int, Candidate, Scored | Layout | None]] = [
            (scores.least_time(candidate), number, candidate, None)
            for number, candidate in enumerate(candidates)
        ]
        heapq.heapify(self._heap)

    def in_order(self) -> Iterator[Scored]:
        """Those that fit, the fastest first."""
        while self._heap:
            _, number, candidate, known = heapq.heappop(self._heap)
            if isinstance(known, Scored):
                yield known
                continue
            closer = self._closer(candidate, known)
            if closer is not None:
                heapq.heappush(self._heap, (closer[0], number, candidate, closer[1]))

    def _closer(self, candidate: Candidate, layout: Layout | None) -> tuple[float, Scored | Layout] | None:
        """Its time where it fits; a time that it can't beat where only a slower cut fits; None where none does.

        Args:
            layout: with the fastest cut, which is known not to fit; None: not looked at yet.
        """
        scores, limit = self._scores, self._scores.limit
        if layout is None:
            if candidate.micro_batch > self._overfull.get(
                scores.alike_in_memory(candidate), candidate.micro_batch
            ):
                self._falls(candidate)
                return None
            layout = scores.fastest(candidate)
            memory = scores.memory(candidate, layout)
            if limit is not None and memory > limit:
                self.nearest.append((candidate, layout, memory))
                if scores.may_fit(candidate):
                    return scores.time(candidate, layout).total, layout
                self._falls(candidate)
                return None
        else:
            layout = scores.within_memory(candidate)
            memory = scores.memory(candidate, layout)
            if limit is not None and memory > limit:
                self.nearest.append((candidate, layout, memory))
                self._falls(candidate)
                return None
        held_back = any(fallen.layout == candidate.layout for fallen in self.too_large)
        scored = Scored(candidate, layout, scores.time(candidate, layout), memory, held_back)
        return scored.seconds, scored

    def _falls(self, candidate: Candidate) -> None:
        self.too_large.append(candidate)
        kind = self._scores.alike_in_memory(candidate)
        self._overfull[kind] = min(self._overfull.get(kind, candidate.micro_batch), candidate.micro_batch)
