"""The output of ``dstrain rehearse``: for each stage its memory, traffic, waits and attention kernels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.text import Text

from dstrain.api.rehearsing import RehearsalResult
from dstrain.cli.showing.estimates import headed
from dstrain.cli.showing.tables import Column, FoldingTable
from dstrain.formatting import format_bytes
from dstrain.report.rehearsal import FIRST_STEP, STEP, Compared, RehearsedStage, heading_of_waits


def show_rehearsal(result: RehearsalResult, console: Console) -> None:
    """Print all stages, and what a rehearsal does not show."""
    for stage in result.stages:
        _show_stage(stage, result.plan.layout.pipeline, console)
    for number, limit in enumerate(result.limits):
        console.print(headed("limits" if number == 0 else "", limit, "dim"))
    if result.agrees:
        console.print(headed("verdict", "as planned", "bold green"))


def _show_stage(stage: RehearsedStage, stages: int, console: Console) -> None:
    console.print(Text(f"stage {stage.stage} of {stages}, rank {stage.rank}", style="bold"))
    seconds = sum(stage.seconds.values())
    console.print(
        Text(f"rehearsed in {seconds:.0f} s with {format_bytes(stage.host_bytes)} of this host", style="dim")
    )
    console.print()
    if stage.memory:
        console.print(_compared("peak memory\nof a rank", (*stage.memory, stage.total)))
        phases = ", ".join(f"{phase} {format_bytes(size)}" for phase, size in stage.phase_totals.items())
        console.print(Text(f"the total in each phase: {phases}", style="dim"))
        console.print()
    if stage.fullest:
        console.print(_fullest(stage))
        console.print()
    if stage.traffic:
        console.print(_compared("traffic of a\nrank in a step", stage.traffic))
        console.print()
    messages = [message for message in stage.messages if message["phase"] == STEP]
    if messages:
        console.print(_messages(messages))
        console.print()
    console.print(Text(heading_of_waits(stage), style="bold"))
    if stage.waits:
        console.print(_waits(stage.waits))
    console.print()
    if stage.attention:
        console.print(_attention(stage.attention))
        console.print()
    for wrong in stage.wrong_devices:
        console.print(headed("device", f"{wrong['phase']}: {wrong['what']} ({wrong['where']})", "bold red"))
    for failure in stage.failures:
        where = f" ({failure['where']})" if failure["where"] else ""
        console.print(headed("failed", f"{failure['phase']}: {failure['error']}{where}", "bold red"))


def _compared(what: str, rows: Iterable[Compared]) -> FoldingTable:
    table = FoldingTable(
        Column(what),
        *(Column(f"\n{heading}", right=True) for heading in ("planned", "rehearsed", "difference")),
    )
    for row in rows:
        by = f"{row.difference:+.1%}" if row.difference is not None else "-"
        table.add_row(row.name, format_bytes(row.planned), format_bytes(row.rehearsed), by)
    return table


def _fullest(stage: RehearsedStage) -> FoldingTable:
    table = FoldingTable(
        Column("at the fullest\nmoment", right=True),
        Column("\nwhat", gives=True),
        Column("\nmade by", gives=True, style="dim"),
    )
    for size, what, trace in stage.fullest:
        table.add_row(format_bytes(size), what, trace)
    return table


def _messages(messages: Iterable[Mapping[str, Any]]) -> FoldingTable:
    table = FoldingTable(
        Column("collectives and messages of a step", gives=True),
        *(Column(heading, right=True) for heading in ("times", "elements", "ranks")),
        Column("type"),
        Column("device"),
    )
    for one in messages:
        table.add_row(
            one["kind"],
            f"{one['count']:,}",
            f"{one['elements']:,}",
            f"{one['ranks']:,}",
            one["dtype"],
            one["device"],
        )
    return table


def _waits(waits: Iterable[Mapping[str, Any]]) -> FoldingTable:
    table = FoldingTable(
        Column("phase"), Column("times", right=True), Column("waits for"), Column("where", gives=True)
    )
    for wait in waits:
        if wait["phase"] == FIRST_STEP:  # the second has them too
            continue
        table.add_row(wait["phase"], f"{wait['count']:,}", wait["what"], wait["where"])
    return table


def _attention(calls: Iterable[Mapping[str, Any]]) -> FoldingTable:
    table = FoldingTable(
        Column("attention\nkernel"),
        Column("\ncalls", right=True),
        Column("\nquery", gives=True),
        Column("\nkey", gives=True),
        Column("\nmask", gives=True),
        Column("\nwhy", gives=True, style="dim"),
    )
    for call in calls:
        table.add_row(
            call["kernel"],
            f"{call['count']:,}",
            f"{call['dtype']} {list(call['query'])}",
            str(list(call["key"])),
            call["mask"] or "none",
            call["reason"],
        )
    return table
