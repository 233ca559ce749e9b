"""The layout, the single owner of ranks: (host, local rank) -> rank -> (stage, replica).

Stages of one replica have neighbouring ranks, so that a pipeline stays inside one machine as long as
it fits there, and the replicas, which meet less often, lie on different machines.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

from dstrain.errors import DstrainError

HOSTS = "DSTRAIN_HOSTS"
"""The environment variable with the names of a run's hosts, in the order of their ranks, with commas in between."""
STORE_PORT = "DSTRAIN_STORE_PORT"
"""The environment variable with the port of the ranks' store, where their launcher says another in MASTER_PORT."""


@dataclass(frozen=True)
class Host:
    """A machine and the number of ranks (GPUs) that it may hold."""

    name: str
    slots: int


@dataclass(frozen=True)
class Place:
    """Where one rank sits, and what it holds."""

    rank: int
    host: str
    local_rank: int
    stage: int
    replica: int
    chunks: tuple[range, ...]


@dataclass(frozen=True)
class Layout:
    """``data_parallel`` replicas of a pipeline of ``pipeline`` stages, on ``hosts``.

    Attributes:
        hosts: the machines that are used, with the slots that are used.
        cut: first layer of each chunk of layers, and the number of layers at the end.
        schedule: ``1f1b``: stage s holds chunk s. ``dualpipev``: there are 2 x pipeline chunks, and
            stage s holds chunk s on the way out and chunk 2 x pipeline - 1 - s on the way back.
    """

    hosts: tuple[Host, ...]
    pipeline: int
    data_parallel: int
    cut: tuple[int, ...]
    schedule: str = "1f1b"

    def __post_init__(self) -> None:
        if len(self.cut) != count_chunks(self.pipeline, self.schedule) + 1 or any(
            a >= b for a, b in itertools.pairwise(self.cut)
        ):
            raise ValueError(f"cut {self.cut} does not cut {self.pipeline} non-empty stages")
        if sum(host.slots for host in self.hosts) != self.world_size:
            raise ValueError(f"{self.world_size} ranks on {self.hosts}")

    @property
    def world_size(self) -> int:
        return self.pipeline * self.data_parallel

    def rank(self, stage: int, replica: int) -> int:
        return replica * self.pipeline + stage

    def stage(self, rank: int) -> int:
        return rank % self.pipeline

    def replica(self, rank: int) -> int:
        return rank // self.pipeline

    def host(self, rank: int) -> int:
        """The position of a rank's host in ``hosts``."""
        return bisect_right(self._ends, rank)

    @cached_property
    def slots(self) -> tuple[int, ...]:
        """The ranks on each host."""
        return tuple(host.slots for host in self.hosts)

    @cached_property
    def _ends(self) -> list[int]:
        """The first rank behind each host."""
        return list(itertools.accumulate(self.slots))

    def chunks(self, stage: int) -> tuple[range, ...]:
        """The layers of a stage, as ranges of positions in [embed, block 0, ..., head]."""
        indices = [stage]
        if self.schedule == "dualpipev" and self.pipeline > 1:
            indices.append(2 * self.pipeline - 1 - stage)
        return tuple(range(self.cut[index], self.cut[index + 1]) for index in indices)

    def places(self) -> Iterator[Place]:
        """Every rank, in order. Hosts are filled one after the other, as DeepSpeed's launcher does."""
        seats = [(host.name, local) for host in self.hosts for local in range(host.slots)]
        for rank, (host, local_rank) in enumerate(seats):
            stage = self.stage(rank)
            yield Place(rank, host, local_rank, stage, self.replica(rank), self.chunks(stage))


def count_chunks(pipeline: int, schedule: str) -> int:
    """Into how many chunks the layers are cut: one a stage, two with DualPipeV."""
    return 2 * pipeline if schedule == "dualpipev" and pipeline > 1 else pipeline


@lru_cache(maxsize=1024)
def fill_hosts(hosts: tuple[Host, ...], ranks: int) -> tuple[Host, ...]:
    """The first ``ranks`` slots of ``hosts``; hosts that stay empty are left out."""
    filled = []
    for host in hosts:
        taken = min(host.slots, ranks)
        if taken:
            filled.append(Host(host.name, taken))
        ranks -= taken
    return tuple(filled)


def choose_data_parallel(pipeline: int, data_parallel: int | None, devices: int | None, *, where: str) -> int:
    """The number of replicas: as asked for, or what the devices allow.

    Args:
        devices: how many there are; None where processes can be had at will (CPU).
        where: origin of the number of stages, for messages.

    Raises:
        DstrainError: the devices don't hold the layout, or can't be divided evenly.
    """
    if devices is None:
        return data_parallel or 1
    if data_parallel is not None:
        needed = pipeline * data_parallel
        if needed > devices:
            raise DstrainError(
                f"{pipeline} stages x {data_parallel} replicas need {needed} devices, but there are {devices}",
                where=where,
                hint=_smaller_layouts(pipeline, data_parallel, devices),
            )
        return data_parallel
    if devices % pipeline:
        hint = _layouts_that_fit(devices)
        if pipeline < devices:
            hint += f"; or --data-parallel {devices // pipeline} to leave {devices % pipeline} idle"
        raise DstrainError(
            f"{devices} devices can't be divided evenly into {pipeline} stages", where=where, hint=hint
        )
    return devices // pipeline


def _smaller_layouts(pipeline: int, data_parallel: int, devices: int) -> str:
    smaller = []
    if pipeline <= devices:
        smaller.append(f"--data-parallel {devices // pipeline}")
    if data_parallel <= devices:
        smaller.append(f"--pipeline {devices // data_parallel}")
    return " or ".join(smaller) or _layouts_that_fit(devices) + ", without --data-parallel"


def _layouts_that_fit(devices: int) -> str:
    stages = [str(n) for n in range(1, devices + 1) if devices % n == 0]
    return f"--pipeline {' or '.join(stages)} uses all {devices}"
