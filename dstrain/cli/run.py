"""``dstrain run``: plan, launch, watch, and say what came out."""

from __future__ import annotations

from typing import Any

import click

from dstrain.cli.options import choices, given, layers
from dstrain.errors import DstrainError


@click.command("run")
@layers
@choices
@click.option("--dry-run", is_flag=True, help="Show the plan and the launch command, and start nothing.")
@click.option("--resume", is_flag=True, help="Go on in the run folder of this --name.")
def command(
    recipe: str | None,
    config_file: str | None,
    settings: tuple[str, ...],
    dry_run: bool,
    resume: bool,
    **flags: Any,
) -> None:
    """Train: plan, launch, watch, and say what came out.

    Without any argument, a small model learns Python from the standard library in three minutes.
    """
    from rich.console import Console

    from dstrain.cli.execute import execute, new_run_folder
    from dstrain.cli.planning import plan_for
    from dstrain.cli.show import show_plan
    from dstrain.config.loader import load_config

    resolved = load_config(recipe=recipe, config_file=config_file, settings=settings, flags=given(flags))
    if resume and resolved.config.name is None:
        raise DstrainError(
            "which run?", where="--resume", hint="name it: --name NAME, or use `dstrain resume RUN`"
        )
    folder = new_run_folder(resolved, resume=resume)
    planned = plan_for(resolved)
    console = Console()
    show_plan(planned.plan, console)
    execute(planned, resolved, folder, console, dry_run=dry_run)
