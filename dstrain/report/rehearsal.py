"""A rehearsed rank held against its plan: memory by class, bytes sent in a step, and what goes wrong on a GPU."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dstrain.estimate.memory import StageMemory
from dstrain.estimate.traffic import Traffic
from dstrain.formatting import format_bytes, format_count

MEMORY_BOUND = 0.05
"""How far the total may be from the plan's."""

TRAFFIC_BOUND = 0.05
TRAFFIC_FLOOR = 4096
"""Bytes of losses, norms and flags, which no plan counts."""

FIRST_STEP, STEP = "step 1", "step 2"
"""The second is held against the plan: the optimizer has its states then."""

LIMITS = (
    "no times: nothing is computed",
    "no NCCL: collectives end at once, and none can hang",
    "no fragmentation: bytes of tensors, without what the allocator rounds up and keeps, the CUDA context, and NCCL's"
    " buffers",
    "attention kernels are chosen by torch's rules, not by running them",
    "values are not there: what depends on them goes as in a step without inf, nan or skipped steps",
)

# What the plan speaks of, and what carries it.
_CARRIERS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    (
        "reduced gradients",
        ("gradients", "tied weights"),
        ("all_reduce", "reduce", "reduce_scatter", "reduce_scatter_tensor"),
    ),
    ("gathered weights", ("weights",), ("all_gather_into_tensor",)),
    ("between stages", ("activations", "activation gradients"), ("send",)),
)


@dataclass(frozen=True)
class Compared:
    """One number of the plan and of the rehearsal, in bytes."""

    name: str
    planned: int
    rehearsed: int

    @property
    def difference(self) -> float | None:
        """Of the plan from the rehearsal, as a fraction of the latter; None where nothing was rehearsed."""
        return self.planned / self.rehearsed - 1 if self.rehearsed else None


@dataclass(frozen=True)
class RehearsedStage:
    """The rehearsal of a stage's rank.

    Attributes:
        stage, rank: which one.
        memory: peak bytes of each class in the second step, each at its own fullest moment.
        total: of all classes at their common fullest moment.
        phase_totals: the fullest moment of each phase, in bytes.
        traffic: bytes that the rank sends in a step.
        messages: collectives and messages: ``phase``, ``kind``, ``dtype``, ``elements``, ``device``, ``ranks``,
            ``count``.
        waits: where the host waits for the GPU: ``phase``, ``what``, ``where``, ``count``.
        attention: calls of torch's attention: ``kernel``, ``reason``, ``query``, ``key``, ``dtype``, ``mask``,
            ``count``.
        wrong_devices: tensors that their group's backend does not reach: ``phase``, ``what``, ``where``, ``count``.
        failures: what ended a phase: ``phase``, ``error``, ``where``.
        fullest: what is there at the fullest moment: bytes, what, where it was made; empty where it was not asked for.
        seconds: of each phase.
        host_bytes: the largest resident memory of the process.
    """

    stage: int
    rank: int
    memory: tuple[Compared, ...]
    total: Compared
    phase_totals: Mapping[str, int]
    traffic: tuple[Compared, ...]
    messages: Sequence[Mapping[str, Any]]
    waits: Sequence[Mapping[str, Any]]
    attention: Sequence[Mapping[str, Any]]
    wrong_devices: Sequence[Mapping[str, Any]]
    failures: Sequence[Mapping[str, str]]
    fullest: Sequence[Sequence[Any]]
    seconds: Mapping[str, float]
    host_bytes: int

    @property
    def differences(self) -> tuple[str, ...]:
        """What is not as planned, in words; empty where all is."""
        found = [
            f"{failure['phase']} fails: {failure['error']} ({failure['where']})" for failure in self.failures
        ]
        found += [
            f"{wrong['phase']}: {wrong['what']} in a collective that can't reach it ({wrong['where']})"
            for wrong in self.wrong_devices
        ]
        if any(failure["phase"] in ("build", FIRST_STEP, STEP) for failure in self.failures):
            return tuple(found)
        if not _near(self.total, MEMORY_BOUND):
            found.append(_in_words("memory", self.total))
        most = max(self.total.planned, self.total.rehearsed)
        found += [
            f"{phase} takes {format_bytes(size)}, more than the {format_bytes(self.total.planned)} that are planned"
            for phase, size in self.phase_totals.items()
            if phase != STEP and size > (1 + MEMORY_BOUND) * most + self._room_for_a_copy(phase)
        ]
        found += [
            _in_words(part.name, part)
            for part in self.traffic
            if not _near(part, TRAFFIC_BOUND, TRAFFIC_FLOOR)
        ]
        return tuple(found)

    def _room_for_a_copy(self, phase: str) -> int:
        """DeepSpeed lays the parameters out in one piece on the GPU where there is room for both, else on the host."""
        parameters = (part.planned for part in self.memory if part.name == "parameters")
        return sum(parameters) if phase == "build" else 0

    def to_record(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self) | {"differences": list(self.differences)}


def compare(need: StageMemory, sent: Iterable[Traffic], answer: Mapping[str, Any]) -> RehearsedStage:
    """Hold a rank's answer against what the plan says of its stage.

    Args:
        need: the plan's memory.
        sent: the plan's traffic.
        answer: of `dstrain.rehearsal.rank_process`.
    """
    planned = {part.what: part.bytes for part in sent}
    return RehearsedStage(
        stage=answer["stage"],
        rank=answer["rank"],
        memory=tuple(Compared(name, getattr(need, name), size) for name, size in answer["peaks"].items()),
        total=Compared("total", need.total, answer["total"]),
        traffic=_traffic(planned, answer["messages"]),
        **{
            name: answer[name]
            for name in (
                *("phase_totals", "messages", "waits", "attention", "wrong_devices", "failures"),
                *("fullest", "seconds", "host_bytes"),
            )
        },
    )


def sent_bytes(message: Mapping[str, Any]) -> float:
    """That a ring sends from each rank for one such collective, or that a message has."""
    whole = float(message["elements"] * _size(message["dtype"]))
    if message["kind"] == "send":
        return whole
    ranks = int(message["ranks"])
    times = {"all_reduce": 2, "recv": 0}.get(message["kind"], 1)
    return times * (ranks - 1) / ranks * whole


def _traffic(planned: Mapping[str, int], messages: Iterable[Mapping[str, Any]]) -> tuple[Compared, ...]:
    found = []
    seen = [message for message in messages if message["phase"] == STEP]
    for name, parts, kinds in _CARRIERS:
        wanted = sum(planned.get(part, 0) for part in parts)
        real = sum(sent_bytes(one) * one["count"] for one in seen if one["kind"] in kinds)
        if wanted or real > TRAFFIC_FLOOR:
            found.append(Compared(name, wanted, round(real)))
    return tuple(found)


def _size(dtype: str) -> int:
    sizes = {
        "bool": 1,
        "uint8": 1,
        "int8": 1,
        "bfloat16": 2,
        "float16": 2,
        "int16": 2,
        "float64": 8,
        "int64": 8,
    }
    return sizes.get(dtype, 4)


def _near(found: Compared, bound: float, floor: int = 0) -> bool:
    return abs(found.planned - found.rehearsed) <= bound * found.rehearsed + floor


def _in_words(what: str, found: Compared) -> str:
    by = f", {found.difference:+.1%}" if found.difference is not None else ""
    return f"{what}: {format_bytes(found.planned)} planned, {format_bytes(found.rehearsed)} rehearsed{by}"


def waits_in_a_step(stage: RehearsedStage) -> int:
    """How often the host waits for the GPU in the second step."""
    return sum(int(wait["count"]) for wait in stage.waits if wait["phase"] == STEP)


def heading_of_waits(stage: RehearsedStage) -> str:
    """``12 waits for the GPU in a step``."""
    return f"{format_count(waits_in_a_step(stage), 'wait')} for the GPU in a step"
