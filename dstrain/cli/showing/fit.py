"""The output of ``dstrain plan --fit``: the best layouts, their flags, and why others were rejected."""

from __future__ import annotations

import click
from rich.text import Text

from dstrain.api.fitting import FitResult, FitRow
from dstrain.cli.showing.estimates import format_duration, headed
from dstrain.cli.showing.tables import Column, FoldingTable, make_console
from dstrain.formatting import format_bytes, format_count
from dstrain.strict_json import to_json


def show_fit(fitted: FitResult, *, as_json: bool) -> None:
    """Print what was found, for the eyes or for programs."""
    if as_json:
        click.echo(to_json(fitted.to_record(), indent=2))
        return
    console, fit = make_console(), fitted.fit
    console.print(headed("on", fitted.machines))
    if fitted.fixed:
        console.print(headed("as you", f"chose: {', '.join(fitted.fixed)}"))
    console.print()
    if not fit.fits:
        console.print(headed("memory", _nothing_fits(fitted), "bold red"))
        console.print()
    console.print(_table(fitted))
    if fit.limit is not None:
        console.print(Text(f"100% of memory means {format_bytes(fit.limit)}, the usable part", style="dim"))
    console.print(Text("times within 2 % count as equal; the simpler layout comes first", style="dim"))
    console.print()
    console.print(headed("type", "the same arguments, plus for"))
    for number, row in enumerate(fitted.rows, start=1):
        flags = row.flags or "nothing: this is your current layout"
        console.print(headed(f"{number:>7}", f"{flags}  ({row.scored.binds})"))
    console.print()
    console.print(
        headed(
            "found",
            f"among {format_count(fit.looked_at, 'candidate')}; reasons for rejecting the others:",
            "dim",
        )
    )
    for reason, number in fit.fallen.items():
        console.print(headed(f"{number:>7,}", reason, "dim"))


def _table(fitted: FitResult) -> FoldingTable:
    # Ranks on CPUs share their host's memory.
    fullest = "memory\nof a host" if fitted.rows[0].plan.accelerator == "cpu" else "memory of\nfullest rank"
    table = FoldingTable(
        Column(right=True),
        Column("\nlayout", gives=True),
        *(
            Column(heading, right=True)
            for heading in ("micro-\nbatch", "recom-\npute", "\na step", "\ntokens/s", fullest)
        ),
    )
    for number, row in enumerate(fitted.rows, start=1):
        candidate, time = row.scored.candidate, row.scored.time
        table.add_row(
            str(number),
            candidate.layout.name,
            str(candidate.micro_batch),
            "yes" if candidate.activation_checkpointing else "no",
            format_duration(time.total),
            f"{time.tokens_per_second:,.0f}",
            _memory(row, fitted.fit.limit),
        )
    return table


def _memory(row: FitRow, limit: float | None) -> str:
    if limit is None:
        return format_bytes(row.scored.memory)
    tight = ", tight" if row.plan.memory_verdict.startswith("tight") else ""
    return f"{format_bytes(row.scored.memory)}, {row.scored.memory / limit:.0%}{tight}"


def _nothing_fits(fitted: FitResult) -> str:
    """By how much, and what would help."""
    fit, nearest = fitted.fit, fitted.rows[0]
    limit = fit.limit or 0.0
    on = "on a host" if nearest.plan.accelerator == "cpu" else "on a rank"
    text = (
        f"nothing fits. The closest layout needs {format_bytes(nearest.scored.memory)} {on}, but only"
        f" {format_bytes(limit)} is usable: {format_bytes(nearest.scored.memory - limit)} too much. "
    )
    if fitted.helps:
        return text + f"A layout fits without {' or without '.join(fitted.helps)}."
    return text + "More or larger devices help, a smaller --seq-len, or a smaller model."
