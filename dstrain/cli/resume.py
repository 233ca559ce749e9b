"""``dstrain resume RUN``: go on with a run from its newest complete checkpoint."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from dstrain.cli.options import choices, given, node_rank_option
from dstrain.errors import DstrainError


@click.command("resume")
@click.argument("run")
@choices
@click.option("--dry-run", is_flag=True, help="Show the plan and the launch command, and start nothing.")
@node_rank_option
def command(run: str, settings: tuple[str, ...], dry_run: bool, node_rank: int | None, **flags: Any) -> None:
    """Go on with RUN (a run folder, or its name below runs/) from its newest complete checkpoint.

    Flags that are given change its config: --steps to train longer, or --pipeline, --data-parallel, --zero and
    their like to train the same on in another layout.
    """
    from dstrain.checkpoint.identity import refuse_other_batch
    from dstrain.checkpoint.manifest import choose_newest, read_manifest, run_id
    from dstrain.cli.planning import plan_for
    from dstrain.cli.running.by_hand import node_of, prepare_for_nodes
    from dstrain.cli.running.execute import execute
    from dstrain.cli.showing.plan import show_plan
    from dstrain.cli.showing.tables import make_console
    from dstrain.config.loader import override, read_config
    from dstrain.plan.run_folder import RunFolder, last_step

    folder = find_run(run)
    if flags.get("name") is not None:
        raise DstrainError("a run that is resumed keeps its name", where="--name", hint="leave it out")
    resolved = override(read_config(folder.config), given(flags), settings)
    node = node_of(resolved, node_rank)
    newest = choose_newest(folder.checkpoints, run_id(folder.run_id, folder.checkpoints)).checkpoint
    trained = (
        read_manifest(newest)["step"] if newest else 0 if resolved.config.saves else last_step(folder.metrics)
    )
    if folder.result.exists() and trained >= resolved.config.steps:
        click.echo(
            f"{folder.name} has finished its {resolved.config.steps} steps; --steps N with a larger N trains on"
        )
        return
    if newest is None:
        click.echo(f"{folder.name} has no complete checkpoint yet: it starts from step 1")
    else:
        click.echo(f"{folder.name} goes on from {newest.name}")
        config = resolved.config
        refuse_other_batch(newest, global_batch=config.global_batch, data_parallel=config.data_parallel)
    planned = plan_for(resolved)
    console = make_console()
    show_plan(planned.plan, console)
    if planned.site.launcher == "none" and node is None:
        prepare_for_nodes(planned, resolved, folder, console, dry_run=dry_run)
        return
    execute(planned, resolved, RunFolder(folder.path, node or 0), console, dry_run=dry_run)


def find_run(run: str) -> Any:
    """The run folder that RUN means. Raises DstrainError."""
    from dstrain.config.text_file import shown
    from dstrain.plan.run_folder import RunFolder

    with suppress(OSError):  # a name that no folder can have
        for path in (Path(run), Path("runs") / run):
            if (path / "config.yaml").is_file():
                return RunFolder(path)
    known = sorted(path.parent.name for path in Path("runs").glob("*/config.yaml"))
    hint = f"below runs/ there are: {', '.join(known[-8:])}" if known else "`dstrain run` makes one"
    raise DstrainError(f"{shown(run)!r} is no run folder (it has no config.yaml)", where="RUN", hint=hint)
