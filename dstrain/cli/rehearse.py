"""``dstrain rehearse``: runs a rank of each chosen stage on a fake GPU, and holds it against the plan."""

from __future__ import annotations

from typing import Any

import click

from dstrain.cli.options import GroupedOptions, choices, given, layers
from dstrain.errors import DstrainError
from dstrain.strict_json import to_json


@click.command("rehearse", cls=GroupedOptions)
@layers
@choices
@click.option(
    "--stage", type=click.IntRange(0), help="Which stage. Default: the one that needs the most memory."
)
@click.option("--all", "every", is_flag=True, help="Rehearse every stage.")
@click.option(
    "--trace", is_flag=True, help="Show what is in memory at the fullest moment, and the lines that made it."
)
@click.option(
    "--device",
    metavar="NAME|FILE",
    help="Rehearse devices that are not on this machine: h100-80g, a100-40g, ..., or a file. With --nodes"
    " or --hostfile.",
)
@click.option("--gpus-per-node", type=click.IntRange(1), help="With --device: devices per node.")
@click.option("--json", "as_json", is_flag=True, help="Print the whole result as JSON.")
def command(
    recipe: str | None,
    config_file: str | None,
    settings: tuple[str, ...],
    stage: int | None,
    every: bool,
    trace: bool,
    device: str | None,
    gpus_per_node: int | None,
    as_json: bool,
    **flags: Any,
) -> None:
    """Run a rank of the plan on a fake GPU: build, two steps, validation, checkpoint, generation.

    Needs no GPU, and computes nothing. Shows the peak memory by class and the bytes sent beside the plan's, each place
    where the host waits for the GPU, and the kernel of each attention call. Exit code 1 where it differs from the plan.
    """
    from dstrain.api.planning import load_config
    from dstrain.api.rehearsing import rehearse
    from dstrain.cli.showing.progress import PROGRESS

    if every and stage is not None:
        raise DstrainError(
            "--stage and --all can't be combined", where="--stage", hint="remove one of the two"
        )
    config = load_config(config_file, recipe=recipe, settings=settings, flags=given(flags))
    result = rehearse(
        config,
        device=device,
        gpus_per_node=gpus_per_node,
        stages="all" if every else [stage] if stage is not None else None,
        traced=trace,
        events=PROGRESS,
    )
    if as_json:
        click.echo(to_json(result.to_record(), indent=2))
    else:
        from dstrain.cli.showing.rehearsal import show_rehearsal
        from dstrain.cli.showing.tables import make_console

        show_rehearsal(result, make_console())
    if not result.agrees:
        listed = "".join(f"\n  {difference}" for difference in result.differences)
        raise DstrainError(f"the rehearsal differs from the plan:{listed}", exit_code=1)
