"""``dstrain config show``: the final DeepSpeed JSON."""

from __future__ import annotations

import json
from typing import Any

import click

from dstrain.cli.options import choices, given, layers


@click.command("show")
@layers
@choices
@click.option("--origins", is_flag=True, help="With the origin of every key.")
def command(
    recipe: str | None, config_file: str | None, settings: tuple[str, ...], origins: bool, **flags: Any
) -> None:
    """Show the final DeepSpeed JSON of these arguments."""
    from dstrain.cli.planning import plan_for
    from dstrain.cli.showing.tables import Column, FoldingTable, make_console
    from dstrain.config.loader import load_config
    from dstrain.config.nested import leaves

    resolved = load_config(recipe=recipe, config_file=config_file, settings=settings, flags=given(flags))
    plan = plan_for(resolved).plan
    if not origins:
        click.echo(json.dumps(plan.deepspeed, indent=2))
        return
    table = FoldingTable(Column(gives=True), Column(gives=True), Column(gives=True))
    for path, value in leaves(plan.deepspeed):
        key = ".".join(path)
        table.add_row(key, json.dumps(value), plan.deepspeed_origins[key])
    make_console(whole_lines=True).print(table)
