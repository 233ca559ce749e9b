"""``dstrain run``: plan, launch, watch, and say what came out."""

from __future__ import annotations

from typing import Any

import click

from dstrain.cli.options import choices, given, layers, node_rank_option
from dstrain.errors import DstrainError


@click.command("run")
@layers
@choices
@click.option("--dry-run", is_flag=True, help="Show the plan and the launch command, and start nothing.")
@click.option("--prepare", is_flag=True, help="Fill the run folder, say what starts it, and start nothing.")
@click.option("--resume", is_flag=True, help="Go on in the run folder of this --name.")
@node_rank_option
def command(
    recipe: str | None,
    config_file: str | None,
    settings: tuple[str, ...],
    dry_run: bool,
    prepare: bool,
    resume: bool,
    node_rank: int | None,
    **flags: Any,
) -> None:
    """Train: plan, launch, watch, and say what came out.

    Without any argument, a small model learns Python from the standard library in three minutes.
    """
    from dstrain.cli.planning import plan_for
    from dstrain.cli.running.by_hand import node_of, prepare_for_nodes, prepare_to_be_typed
    from dstrain.cli.running.execute import execute
    from dstrain.cli.running.starting import new_run_folder
    from dstrain.cli.showing.plan import show_plan
    from dstrain.cli.showing.tables import make_console
    from dstrain.config.loader import load_config
    from dstrain.plan.run_folder import RunFolder

    resolved = load_config(recipe=recipe, config_file=config_file, settings=settings, flags=given(flags))
    if resume and resolved.config.name is None:
        raise DstrainError(
            "which run?", where="--resume", hint="name it: --name NAME, or use `dstrain resume RUN`"
        )
    node = node_of(resolved, node_rank)
    # Whichever node comes first makes the folder: the others find it.
    folder = RunFolder(new_run_folder(resolved, resume=resume or node_rank is not None).path, node or 0)
    planned = plan_for(resolved)
    console = make_console()
    show_plan(planned.plan, console)
    if planned.site.launcher == "none" and node is None:
        prepare_for_nodes(planned, resolved, folder, console, dry_run=dry_run)
    elif prepare and not dry_run:
        prepare_to_be_typed(planned, resolved, folder, console)
    else:
        execute(planned, resolved, folder, console, dry_run=dry_run)
