"""``dstrain doctor``: look at the machines, and say what is wrong and how it is mended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from dstrain.cli.showing.tables import FoldingTable
    from dstrain.doctor.findings import Check

FAILED_CODE = 1


@click.command("doctor")
@click.option(
    "--hostfile", type=click.Path(), help="The machines: `NAME slots=N` lines. Without it: this one."
)
@click.option("--runs-dir", default="runs", show_default=True, help="Where the run folders will lie.")
@click.option("--quick", is_flag=True, help="Without the exchange, which needs torch: a second or two.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def command(hostfile: str | None, runs_dir: str, quick: bool, as_json: bool) -> None:
    """Look at the machines that a run would use, and at what is between them.

    Logins, versions, devices, memory, disks, clocks, names, ports, and a real all-reduce and send over the network.
    The exit code is 1 if something would stop a run.
    """
    import json
    import os
    import sys
    from dataclasses import asdict
    from pathlib import Path

    from dstrain.doctor.examination import examine_hosts, examine_this_machine
    from dstrain.doctor.findings import FAILED
    from dstrain.launch.environment import default_environment
    from dstrain.launch.hosts import read_hostfile
    from dstrain.launch.request import runs_here

    hosts = read_hostfile(hostfile) if hostfile is not None else ()
    alone = runs_here(hosts)
    accelerator = os.environ.get("DS_ACCELERATOR", "")
    environment = default_environment(accelerator or "cuda", 1, alone, hosts=[host.name for host in hosts])
    if not accelerator:
        del environment["DS_ACCELERATOR"]  # each host says what it has
    if alone:
        slots = sum(host.slots for host in hosts)
        checks = examine_this_machine(
            environment=environment, runs=Path(runs_dir), slots=slots, thorough=not quick
        )
    else:
        checks = examine_hosts(hosts, environment=environment, runs=Path(runs_dir), thorough=not quick)
    failed = any(check.status == FAILED for check in checks)
    if as_json:
        click.echo(json.dumps({"ok": not failed, "checks": [asdict(check) for check in checks]}, indent=1))
    else:
        from dstrain.cli.showing.tables import make_console

        make_console().print(_table(checks))
    sys.exit(FAILED_CODE if failed else 0)


def _table(checks: Sequence[Check]) -> FoldingTable:
    """A row for each thing that was found; hosts of which the same is true share it."""
    from rich.box import HEAVY_HEAD
    from rich.text import Text

    from dstrain.cli.showing.tables import Column, FoldingTable
    from dstrain.doctor.findings import FAILED, OK, WARNING

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
