"""A plan's estimates beside what a run measured, and the utilisation that was kept of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click
from rich.text import Text

from dstrain.cli.showing.estimates import format_duration, headed
from dstrain.cli.showing.tables import Column, FoldingTable, make_console
from dstrain.formatting import format_bytes
from dstrain.report.measured import HeldAgainst, Row
from dstrain.strict_json import to_json

if TYPE_CHECKING:
    from dstrain.api.calibration import Calibration


def show_held_against(held: HeldAgainst, kept: Calibration | None, *, as_json: bool) -> None:
    """Print the table, and what was kept."""
    if as_json:
        calibration = {"calibration": vars(kept)} if kept else {}
        click.echo(to_json(held.to_record() | calibration, indent=2))
        return
    console = make_console()
    first, last = held.steps
    console.print(headed("run", f"{held.run}, on {held.plan.device or 'devices of unknown speed'}"))
    console.print(headed("steps", f"{first} to {last}; a step's time is their median"))
    console.print()
    table = FoldingTable(
        Column("of a step", gives=True),
        Column("estimated", right=True),
        Column("measured", right=True),
        Column("difference", right=True),
    )
    for row in held.rows:
        table.add_row(row.what, _value(row, row.estimated), _value(row, row.measured), format_difference(row))
    console.print(table)
    for text in (*held.notes, *(f"{row.what}: {row.note}" for row in held.rows if row.note)):
        console.print(headed("note", text, "bold yellow"))
    if kept is not None:
        console.print(
            headed(
                "kept",
                f"matrix multiplications in {kept.precision} reach {kept.utilisation:.2%} of {kept.device}'s peak"
                " (the plan had"
                f" {held.plan.time.utilisation if held.plan.time else 0:.2%}): later plans on this machine take that;"
                " `dstrain plan --forget-calibration` removes it",
            )
        )


def show_forgotten(gone: Sequence[Calibration], *, as_json: bool) -> None:
    """Print what was removed."""
    if as_json:
        click.echo(to_json({"removed": [vars(each) for each in gone]}, indent=2))
        return
    console = make_console()
    if not gone:
        console.print(Text("nothing was kept of this machine's devices"))
    for each in gone:
        console.print(
            Text(
                f"removed: {each.device} in {each.precision}, {each.utilisation:.2%} of its peak, run {each.run}"
            )
        )


def format_difference(row: Row) -> str:
    """``+12 %``, or ``-`` where there is none."""
    return "-" if row.difference is None else f"{row.difference:+.0%}".replace("%", " %")


def _value(row: Row, value: float | None) -> str:
    if value is None:
        return "-"
    if row.unit == "seconds":
        return format_duration(value)
    return format_bytes(value) if row.unit == "bytes" else f"{value:,.0f}"


def summary_of(held: HeldAgainst) -> str:
    """One line for a run's end: ``0.52 s per step (estimated 0.61 s, -15 %), ...``."""
    parts = []
    for what, unit in (("a step", " per step"), ("memory of the fullest rank", " of memory")):
        row = held.row(what)
        if row.measured is None or row.note:  # what is noted was not measured as it was estimated
            continue
        beside = f"estimated {_value(row, row.estimated)}, {format_difference(row)}"
        parts.append(f"{_value(row, row.measured)}{unit}" + (f" ({beside})" if row.estimated else ""))
    return ", ".join(parts)
