"""``dstrain config diff``: what differs between two runs, and what followed from it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dstrain.errors import DstrainError

if TYPE_CHECKING:
    from dstrain.report.difference import Difference, Side, Value

_TITLES = {
    "config": "what was chosen",
    "deepspeed": "DeepSpeed's keys",
    "layout": "layout",
    "batch": "batch",
    "model": "model",
    "data": "data",
    "versions": "versions",
}


@click.command("diff")
@click.argument("run_a")
@click.argument("run_b")
@click.option("--json", "as_json", is_flag=True, help="The differences as JSON.")
def command(run_a: str, run_b: str, as_json: bool) -> None:
    """Show what differs between RUN_A and RUN_B: run folders, names below runs/, or YAML files.

    The keys that were chosen, with the origin of each; and where both are run folders, what followed from them:
    DeepSpeed's keys, layout, batch, model, data, versions.

    The exit code is 0 without a difference, 1 with one, 2 for errors.
    """
    from dstrain.report.difference import differences

    found = differences(_side(run_a), _side(run_b))
    if as_json:
        click.echo(json.dumps([asdict(each) for each in found], indent=2))
    else:
        _show(found)
    sys.exit(1 if found else 0)


def _side(name: str) -> Side:
    """What ``name`` means: a YAML file, a run folder, or a run's name. Raises DstrainError."""
    from dstrain.cli.resume import find_run
    from dstrain.config.loader import load_config, read_config
    from dstrain.report.difference import chosen, followed

    path = Path(name)
    if path.is_file():
        return chosen(load_config(config_file=name))
    if path.suffix in (".yaml", ".yml"):
        raise DstrainError(f"there is no file {name}", where="RUN", hint="check the path")
    folder = find_run(name)
    return followed(folder, read_config(folder.config))


def _show(found: Sequence[Difference]) -> None:
    """A block for each part: key, value of one side, value of the other, each with its origin."""
    from rich.padding import Padding

    from dstrain.cli.showing.tables import Column, FoldingTable, make_console

    console = make_console(whole_lines=True)
    if not found:
        console.print("no difference")
    for part, title in _TITLES.items():
        rows = [each for each in found if each.part == part]
        if rows:
            table = FoldingTable(Column(gives=True), Column(gives=True), Column(), Column(gives=True))
            for each in rows:
                table.add_row(each.key, _value(each.a), "|", _value(each.b))
            console.print(title)
            console.print(Padding.indent(table, 2))


def _value(value: Value) -> str:
    if value.value is None and value.origin is None:
        return "-"
    return json.dumps(value.value, ensure_ascii=False) + (f" ({value.origin})" if value.origin else "")
