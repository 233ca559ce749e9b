"""What a run measured, beside what its plan had estimated: time, memory and traffic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from dstrain.errors import DstrainError
from dstrain.planning.plan import Plan
from dstrain.runs.record.record import read_launches
from dstrain.runs.run_folder import RunFolder, read_metrics

WARM_UP = 2
"""Steps of a launch that are slower than others: memory is allocated, kernels are loaded or compiled."""

TRAFFIC = {
    "traffic_replicas": ("traffic among replicas", ("gradients", "weights", "tied weights")),
    "traffic_stages": ("traffic between stages", ("activations", "activation gradients")),
}
"""Keys of metrics.jsonl: what they are called, and the kinds of traffic in a plan that they are the sum of."""

Unit = Literal["seconds", "tokens/s", "bytes"]


@dataclass(frozen=True)
class Row:
    """One quantity. None: it was not estimated, or not measured.

    Attributes:
        note: what was measured, where that is not what was estimated.
    """

    what: str
    unit: Unit
    estimated: float | None
    measured: float | None
    note: str = ""

    @property
    def difference(self) -> float | None:
        """Of the measured value, as a fraction of the estimated one."""
        if not self.estimated or self.measured is None:
            return None
        return self.measured / self.estimated - 1


@dataclass(frozen=True)
class HeldAgainst:
    """A run's plan and what was measured.

    Attributes:
        steps: the first and the last step whose time counts.
        notes: what to know of the numbers.
    """

    run: str
    plan: Plan
    steps: tuple[int, int]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    def row(self, what: str) -> Row:
        return next(row for row in self.rows if row.what == what)

    def to_record(self) -> dict[str, Any]:
        """As JSON-serialisable data."""
        return {
            "run": self.run,
            "device": self.plan.device,
            "steps": list(self.steps),
            "rows": [
                {
                    "what": row.what,
                    "unit": row.unit,
                    "estimated": row.estimated,
                    "measured": row.measured,
                    "difference": row.difference,
                    "note": row.note,
                }
                for row in self.rows
            ],
            "notes": list(self.notes),
        }


def hold_against(folder: RunFolder) -> HeldAgainst:
    """The plan of a run beside its metrics, of the steps that its newest launch has trained.

    Raises:
        DstrainError: it has no plan, has trained no step, or its newest steps were trained in another layout.
    """
    plan = Plan.read(folder.plan)
    first, notes = _first_step(plan, folder)
    steps = [
        record
        for record in read_metrics(folder.metrics)
        if record["step"] >= max(1, first) and _is_number(record.get("seconds"))
    ]
    if not steps:
        trained = "its newest launch has" if first > 1 else "it has"
        raise DstrainError(
            f"{folder.name} has nothing to hold its plan against: {trained} not trained a step yet",
            where=str(folder.metrics),
            hint=f"`dstrain resume {folder.path}` trains on; a step's time and memory stand in its line",
        )
    timed = steps[WARM_UP:] or steps
    if len(steps) <= WARM_UP:
        notes.append(f"the time is that of the first {len(steps)} steps, which are slower than later ones")
    seconds = median(record["seconds"] for record in timed)
    time = plan.time
    if time is None:
        notes.append("no time was estimated: the speed of these devices is unknown, or was in this precision")
    rows = [
        Row("a step", "seconds", time.total if time else None, seconds),
        Row(
            "throughput",
            "tokens/s",
            time.tokens_per_second if time else None,
            plan.batch.tokens / seconds,
        ),
        _memory(plan, steps),
        *_traffic(plan, steps),
    ]
    return HeldAgainst(folder.name, plan, (timed[0]["step"], timed[-1]["step"]), tuple(rows), tuple(notes))


def _first_step(plan: Plan, folder: RunFolder) -> tuple[int, list[str]]:
    """The step that the newest launch began with. Raises DstrainError where it had another layout."""
    try:
        newest = read_launches(folder)[-1]
    except DstrainError:  # an older version's, or one that was started by hand without its folder
        return 1, ["which launch trained which steps was not recorded: all are taken to be of this plan"]
    layout = {
        "pipeline": plan.layout.pipeline,
        "data_parallel": plan.layout.data_parallel,
        "schedule": plan.layout.schedule,
        "cut": list(plan.layout.cut),
    }
    was: Mapping[str, Any] = newest.get("layout", layout)
    other = [key for key in layout if was.get(key) != layout[key]]
    micro_batch = newest.get("batch", {}).get("micro_batch", plan.batch.micro_batch)
    zero = newest.get("config", {}).get("zero", plan.config["zero"])
    changes = [f"{key} {was.get(key)} and not {layout[key]}" for key in other]
    changes += [f"ZeRO-{zero} and not {plan.config['zero']}"] if zero != plan.config["zero"] else []
    if micro_batch != plan.batch.micro_batch:
        changes.append(f"micro_batch {micro_batch} and not {plan.batch.micro_batch}")
    if changes:
        raise DstrainError(
            f"{folder.name} was last trained in another layout than its plan has: {', '.join(changes)}",
            where=str(folder.launches),
            hint=f"`dstrain resume {folder.path}` trains on with this plan, and then it can be held against it",
        )
    first = int(newest["first_step"])
    return first, [f"steps before {first} are left out: an earlier launch trained them"] if first > 1 else []


def _memory(plan: Plan, steps: Sequence[Mapping[str, Any]]) -> Row:
    note = ""
    if plan.accelerator == "cpu":
        note = "resident memory of a rank's process: Python and its libraries take about 0.6 GB of it"
    peaks = [record["memory"] for record in steps if _is_number(record.get("memory"))]
    estimated = max(need.total for need in plan.stage_memory)
    return Row("memory of the fullest rank", "bytes", estimated, max(peaks, default=None), note)


def _traffic(plan: Plan, steps: Sequence[Mapping[str, Any]]) -> list[Row]:
    """A row for each kind that was estimated or measured."""
    rows = []
    for key, (what, kinds) in TRAFFIC.items():
        counted = [record[key] for record in steps if _is_number(record.get(key))]
        parts = [part.bytes for part in plan.time.traffic if part.what in kinds] if plan.time else []
        # Of two stages one sends activations, and the other one their gradients.
        apart = key == "traffic_stages" and plan.layout.pipeline == 2 and plan.layout.schedule != "dualpipev"
        of_a_rank = max(parts, default=0) if apart else sum(parts)
        if any(counted) or parts:
            rows.append(Row(what, "bytes", of_a_rank if plan.time else None, max(counted, default=None)))
    return rows


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0
