"""``dstrain run``: plans, launches and monitors a run, and shows its result."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from dstrain.cli.options import GroupedOptions, choices, given, layers, node_rank_option

if TYPE_CHECKING:
    from rich.console import Console

    from dstrain.api.outcome import RunResult
    from dstrain.api.running import Job


@click.command("run", cls=GroupedOptions)
@layers
@choices
@click.option(
    "--dry-run", is_flag=True, help="Show the plan and the launch command, without starting anything."
)
@click.option(
    "--prepare",
    is_flag=True,
    help="Write the run folder, and show the launch command, without starting anything.",
)
@click.option("--resume", is_flag=True, help="Resume the run with this --name.")
@click.option("--verbose", is_flag=True, help="Show the whole plan, as `dstrain plan` does.")
@node_rank_option
def command(
    recipe: str | None,
    config_file: str | None,
    settings: tuple[str, ...],
    dry_run: bool,
    prepare: bool,
    resume: bool,
    verbose: bool,
    node_rank: int | None,
    **flags: Any,
) -> None:
    """Train a model: plan, launch, monitor, and show the result.

    Without arguments, trains a small model on the Python standard library in three minutes.
    """
    from dstrain.api.planning import load_config
    from dstrain.api.running import command_of, execute, new_job
    from dstrain.cli.showing.progress import ConsoleEvents, show_command
    from dstrain.cli.showing.tables import make_console

    config = load_config(config_file, recipe=recipe, settings=settings, flags=given(flags))
    console = make_console()
    with ConsoleEvents(console, verbose=verbose) as events:
        job = new_job(config, resume=resume, node_rank=node_rank, events=events)
        if job.for_every_node:
            show_nodes(job, console, dry_run=dry_run)
        elif dry_run:
            show_command(command_of(job, events), console)
        elif prepare:
            _show_manual_launch(job, console)
        else:
            leave(execute(job, events))


def leave(result: RunResult) -> None:
    """Raise DstrainError for a run that was stopped before its end."""
    from dstrain.errors import DstrainError

    if result.completed:
        return
    if not result.saved:
        raise DstrainError(
            f"stopped after step {result.step}, and nothing is saved (save_every: never)",
            hint=f"`dstrain resume {result.folder}` starts again from step 0",
            exit_code=result.exit_code,
        )
    raise DstrainError(
        f"stopped after step {result.step}, which is saved",
        hint=f"`dstrain resume {result.folder}` continues from there",
        exit_code=result.exit_code,
    )


def show_nodes(job: Job, console: Console, *, dry_run: bool) -> None:
    """Fill the run folder, and show what to type on each node."""
    from rich.text import Text

    from dstrain.api.running import prepare_for_nodes

    for node, line in enumerate(prepare_for_nodes(job, dry_run=dry_run)):
        console.print(Text.assemble((f"node {node}  ", "bold"), line), soft_wrap=True)
    console.print(
        Text(
            "Start them in any order: node 0 waits ten minutes for the others. Each node monitors its own ranks."
        ),
        soft_wrap=True,
    )


def _show_manual_launch(job: Job, console: Console) -> None:
    """Fill the run folder, and show what starts it."""
    from rich.text import Text

    from dstrain.api.running import prepare_manual_launch

    folder, lines = prepare_manual_launch(job)
    for heading, line in zip(("type     ", "or here  "), lines, strict=False):
        console.print(Text.assemble((heading, "bold"), line), soft_wrap=True)
    console.print(
        Text(
            "Ranks started this way are not monitored: if one fails, the others may hang. `dstrain resume"
            f" {folder.path}` starts and monitors them."
        ),
        soft_wrap=True,
    )
