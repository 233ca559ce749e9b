"""``dstrain doctor``: checks the machines of a run, and suggests fixes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from dstrain.cli.once_options import OnceOptions
from dstrain.strict_json import to_json

if TYPE_CHECKING:
    from dstrain.cli.showing.tables import FoldingTable
    from dstrain.diagnostics.diagnosis import Check

FAILED_CODE = 1


@click.command("doctor", cls=OnceOptions)
@click.option(
    "--hostfile", type=click.Path(), help="Hosts to check: `NAME slots=N` lines. Default: this machine."
)
@click.option("--runs-dir", default="runs", show_default=True, help="Folder that will hold the run folders.")
@click.option(
    "--quick", is_flag=True, help="Skip the communication test, which needs torch; takes a second or two."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def command(hostfile: str | None, runs_dir: str, quick: bool, as_json: bool) -> None:
    """Check the machines that a run would use, and the network between them.

    Checks logins, versions, devices, memory, disks, clocks, host names and ports, and runs an all-reduce and a
    point-to-point send over the network. The exit code is 1 if something would stop a run.
    """
    from dstrain.api.diagnosing import doctor
    from dstrain.cli.showing.progress import PROGRESS

    result = doctor(hostfile, runs_dir=runs_dir, quick=quick, events=PROGRESS)
    if as_json:
        checks = [asdict(check) for check in result.checks]
        click.echo(to_json({"ok": result.ok, "checks": checks}, indent=1))
    else:
        from dstrain.cli.showing.tables import make_console

        make_console().print(_table(result.checks))
    sys.exit(0 if result.ok else FAILED_CODE)


def _table(checks: Sequence[Check]) -> FoldingTable:
    """A row for each thing that was found; hosts of which the same is true share it."""
    from rich.box import HEAVY_HEAD
    from rich.text import Text

    from dstrain.cli.showing.tables import Column, FoldingTable
    from dstrain.diagnostics.diagnosis import FAILED, OK, WARNING

    colours = {OK: "green", WARNING: "yellow", FAILED: "bold red"}
    every = len(dict.fromkeys(check.host for check in checks))
    rows: dict[tuple[str, str, str, str], list[str]] = {}
    for check in checks:
        rows.setdefault((check.check, check.status, check.message, check.fix), []).append(check.host)
    # The same check of all hosts side by side, in the order in which the checks were made.
    order = list(dict.fromkeys(check.check for check in checks))
    table = FoldingTable(
        Column("check"),
        Column("host", gives=True),
        Column("status"),
        Column("message", gives=True),
        Column("fix", gives=True),
        lines=HEAVY_HEAD,
    )
    for (name, status, message, fix), hosts in sorted(rows.items(), key=lambda row: order.index(row[0][0])):
        who = f"all {every}" if len(hosts) == every > 1 else ", ".join(hosts)
        table.add_row(name, who, Text(status, style=colours[status]), message, fix)
    return table
