"""The time estimate of a plan: parts of a step, traffic, assumptions."""

from __future__ import annotations

from rich.console import Group, RenderableType

from dstrain.cli.showing.formatting import format_duration, headed
from dstrain.cli.showing.tables import Column, FoldingTable
from dstrain.estimate.time import StepTime
from dstrain.formatting import format_bytes, format_count
from dstrain.planning.plan import Plan

_PARTS = {
    "compute": "compute",
    "overhead": "launch and message latency",
    "bubble": "pipeline bubble",
    "pipeline": "communication between stages",
    "data_parallel": "communication between replicas",
    "optimizer": "optimizer update",
}
_LINKS = {"inside": "inside a host", "between": "between hosts", "host": "to host memory"}


def time(plan: Plan, step: StepTime) -> RenderableType:
    """The parts of a step, what they make of the run, the traffic, and the assumptions."""
    steps = plan.run_config.steps
    lines: list[RenderableType] = [
        headed("time", f"{format_duration(step.total)} per step, estimated: {_parts(plan, step)}"),
        headed(
            "",
            f"{step.tokens_per_second:,.0f} tokens/s, {step.mfu:.0%} of the peak;"
            f" {format_count(steps, 'step')}: {format_duration(step.run_seconds)}",
        ),
    ]
    if step.traffic:
        lines.append(_traffic(step))
    lines += [
        headed("assumes" if number == 0 else "", text, "dim") for number, text in enumerate(step.assumptions)
    ]
    return Group(*lines)


def _parts(plan: Plan, step: StepTime) -> str:
    """What takes a hundredth of the step or more, the longest first."""
    parts = {what: getattr(step, name) for name, what in _PARTS.items()}
    told = sorted((p for p in parts.items() if p[1] >= 0.01 * step.total), key=lambda part: -part[1])
    slowest = " in the slowest stage" if plan.layout.pipeline > 1 else ""
    return ", ".join(
        f"{seconds / step.total:.0%} {what}{slowest if what == _PARTS['compute'] else ''}"
        for what, seconds in told
    )


def _traffic(step: StepTime) -> FoldingTable:
    table = FoldingTable(
        Column("traffic of a step", gives=True),
        Column("over the link", gives=True),
        Column("of a rank", right=True),
        Column("reason", gives=True, style="dim"),
    )
    for traffic in step.traffic:
        table.add_row(traffic.what, _LINKS[traffic.link], format_bytes(traffic.bytes), traffic.reason)
    return table
