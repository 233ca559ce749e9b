"""The tables of stages: layers, parameters and time of each, and memory per rank."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from dstrain.cli.showing.formatting import format_layers
from dstrain.cli.showing.tables import Column, FoldingTable
from dstrain.formatting import format_bytes
from dstrain.planning.plan import Plan

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
