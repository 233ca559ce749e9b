"""The estimates of a plan: tables of stages, memory per rank, and the parts of a step's time."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from dstrain.cli.showing.tables import Column, FoldingTable
from dstrain.estimate.time import StepTime
from dstrain.formatting import format_bytes, format_count
from dstrain.planning.plan import Plan


def headed(heading: str, text: str, style: str = "bold") -> FoldingTable:
    """A text with its heading in front: ``batch  16 samples a step ...``; further lines stay beside the heading."""
    grid = FoldingTable(Column(style=style, least=7), Column(gives=True), gap=1)
    grid.add_row(heading, text)
    return grid


def format_layers(names: Sequence[str], chunk: range) -> str:
    """The layers of a chunk: ``embed .. block 7``."""
    first, last = names[chunk[0]], names[chunk[-1]]
    return first if first == last else f"{first} .. {last}"


def format_duration(seconds: float) -> str:
    """A time with the two units that matter: ``0.82 s``, ``3 min 20 s``, ``2 h 5 min``, ``12.4 days``."""
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 99.5:
        return f"{seconds:.3g} s"
    if seconds < 3600:
        return f"{int(seconds) // 60} min {int(seconds) % 60} s"
    if seconds < 2 * 86400:
        return f"{int(seconds) // 3600} h {int(seconds) % 3600 // 60} min"
    return f"{seconds / 86400:,.1f} days"


# More stages than these are left out of the middle.
_SHOWN = 16
# With the headings that they have: two lines, so that all stand side by side in 80 columns.
_CLASSES = {
    "parameters": "para-\nmeters",
    "gradients": "gradi-\nents",
    "optimizer": "opti-\nmizer",
    "activations": "activa-\ntions",
    "loss": "\nloss",
    "buffers": "\nbuffers",
}


def stages(plan: Plan) -> RenderableType:
    """Layers, parameters and estimated time of each stage."""
    table = FoldingTable(
        Column("stage", right=True),
        Column("layers", gives=True),
        Column("parameters", right=True),
        Column("time", right=True),
    )
    names = plan.model.layers
    for stage in _stages(plan):
        if stage is None:
            table.add_row("...", "", "", "")
            continue
        table.add_row(
            str(stage),
            ", ".join(format_layers(names, chunk) for chunk in plan.layout.chunks(stage)),
            f"{plan.stage_parameters[stage]:,}",
            f"{plan.stage_time[stage]:.2f}",
        )
    if plan.layout.pipeline == 1:
        return table
    return Group(table, Text(_balance(plan), style="dim"))


def _balance(plan: Plan) -> str:
    """How even the cut is expected to be, and what ``auto`` would reach where something else was asked for."""
    text = f"estimated time of the slowest stage: {plan.imbalance:.2f} x the mean"
    if plan.config["partition"] == "auto":
        return text
    return f"{text} (--partition auto: {plan.imbalance_of_auto:.2f} x)"


def memory(plan: Plan) -> RenderableType:
    """Bytes on a rank of each stage, class by class."""
    used = [name for name in _CLASSES if any(getattr(need, name) for need in plan.stage_memory)]
    headings = (*(_CLASSES[name] for name in used), "\ntotal")
    table = FoldingTable(Column("memory\nof a rank"), *(Column(heading, right=True) for heading in headings))
    for stage in _stages(plan):
        if stage is None:
            table.add_row(*["..."] * (len(used) + 2))
            continue
        need = plan.stage_memory[stage]
        table.add_row(f"stage {stage}", *(_bytes(getattr(need, name)) for name in used), _bytes(need.total))
    notes = [
        "each column is the peak of its class; total is the peak of their sum at any one moment, and"
        " so less than the sum of the peaks"
    ]
    if host := max(need.host for need in plan.stage_memory):
        notes.append(f"plus up to {format_bytes(host)} of host memory for offloaded states")
    return Group(table, Text("\n".join(notes), style="dim"))


def _bytes(size: int) -> str:
    return format_bytes(size) if size else "-"


def _stages(plan: Plan) -> list[int | None]:
    """The stages to show; None for those that are left out."""
    number = plan.layout.pipeline
    if number <= _SHOWN:
        return list(range(number))
    return [*range(_SHOWN // 2), None, *range(number - _SHOWN // 2, number)]


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
