"""``dstrain plan``: shows what ``dstrain run`` would do, without starting anything."""

from __future__ import annotations

from typing import Any

import click

from dstrain.cli.options import GroupedOptions, choices, given, layers
from dstrain.errors import DstrainError
from dstrain.strict_json import to_json


@click.command("plan", cls=GroupedOptions)
@layers
@choices
@click.option(
    "--explain", "explained", metavar="KEY", help="Explain a key: what it does, its value here, and why."
)
@click.option(
    "--fit", is_flag=True, help="Search for the best layouts for these devices, and show the flags for each."
)
@click.option(
    "--device",
    metavar="NAME|FILE",
    help="Plan for devices that are not on this machine: h100-80g, a100-40g, ..., or a file. With --nodes"
    " or --hostfile.",
)
@click.option("--gpus-per-node", type=click.IntRange(1), help="With --device: devices per node.")
@click.option("--json", "as_json", is_flag=True, help="Print the whole plan as JSON.")
def command(
    recipe: str | None,
    config_file: str | None,
    settings: tuple[str, ...],
    explained: str | None,
    as_json: bool,
    fit: bool,
    device: str | None,
    gpus_per_node: int | None,
    **flags: Any,
) -> None:
    """Show what `dstrain run` would do with the same arguments, without starting anything."""
    from dstrain.api.machines import elsewhere
    from dstrain.api.planning import load_config, plan_for
    from dstrain.cli.showing.progress import PROGRESS

    if fit and explained is not None:
        raise DstrainError(
            "--fit and --explain can't be combined: --fit compares layouts, --explain describes one",
            where="--explain",
            hint="remove one of the two",
        )
    if explained is not None:
        from dstrain.planning.explain import keys_meant

        keys_meant(explained)  # refuses what is no key, before the model and the data are looked at
    config = load_config(config_file, recipe=recipe, settings=settings, flags=given(flags))
    described = elsewhere(device, gpus_per_node)
    if fit:
        from dstrain.api.fitting import fit_for
        from dstrain.cli.showing.fit import show_fit

        show_fit(fit_for(config, described, PROGRESS), as_json=as_json)
        return
    plan = plan_for(config, described, PROGRESS).plan
    if explained is not None:
        from dstrain.cli.showing.explanation import show_explanation

        show_explanation(plan, explained, as_json=as_json)
        return
    if as_json:
        click.echo(to_json(plan.to_record(), indent=2))
        return
    from dstrain.cli.showing.plan import show_plan
    from dstrain.cli.showing.tables import make_console

    show_plan(plan, make_console(), verbose=True)
