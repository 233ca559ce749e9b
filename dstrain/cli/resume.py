"""``dstrain resume RUN``: resumes a run from its newest complete checkpoint."""

from __future__ import annotations

from typing import Any

import click

from dstrain.cli.options import GroupedOptions, choices, given, node_rank_option, trust_option


@click.command("resume", cls=GroupedOptions)
@click.argument("run")
@choices
@click.option(
    "--dry-run", is_flag=True, help="Show the plan and the launch command, without starting anything."
)
@click.option("--verbose", is_flag=True, help="Show the whole plan, as `dstrain plan` does.")
@trust_option
@node_rank_option
def command(
    run: str,
    settings: tuple[str, ...],
    dry_run: bool,
    verbose: bool,
    trust: bool,
    node_rank: int | None,
    **flags: Any,
) -> None:
    """Resume RUN (a run folder, or its name in runs/) from its newest complete checkpoint.

    Flags override its config: --steps to train longer, or --pipeline, --data-parallel, --zero and
    their like to train the same on in another layout.
    """
    from dstrain.api.resuming import find_run, resumed_job
    from dstrain.api.running import command_of, execute
    from dstrain.cli.run import leave, show_nodes
    from dstrain.cli.showing.progress import ConsoleEvents, show_command
    from dstrain.cli.showing.tables import make_console

    console = make_console()
    with ConsoleEvents(console, verbose=verbose) as events:
        job = resumed_job(
            find_run(run), given(flags), settings, node_rank=node_rank, trust=trust, events=events
        )
        if job is None:
            return
        if job.for_every_node:
            show_nodes(job, console, dry_run=dry_run)
        elif dry_run:
            show_command(command_of(job, events), console)
        else:
            leave(execute(job, events))
