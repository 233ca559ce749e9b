"""``dstrain plan``: what ``dstrain run`` would do with the same arguments, and nothing started."""

from __future__ import annotations

import json
from typing import Any

import click

from dstrain.cli.options import choices, given, layers


@click.command("plan")
@layers
@choices
@click.option("--json", "as_json", is_flag=True, help="The whole plan as JSON.")
def command(
    recipe: str | None, config_file: str | None, settings: tuple[str, ...], as_json: bool, **flags: Any
) -> None:
    """Show what `dstrain run` would do with the same arguments, and start nothing."""
    from dstrain.cli.planning import plan_for
    from dstrain.config.loader import load_config

    resolved = load_config(recipe=recipe, config_file=config_file, settings=settings, flags=given(flags))
    plan = plan_for(resolved).plan
    if as_json:
        click.echo(json.dumps(plan.to_record(), indent=2))
        return
    from rich.console import Console

    from dstrain.cli.show import show_plan

    show_plan(plan, Console())
