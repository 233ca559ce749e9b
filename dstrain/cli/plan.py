"""``dstrain plan``: shows what ``dstrain run`` would do, without starting anything."""

from __future__ import annotations

from typing import Any

import click

from dstrain.cli.options import GroupedOptions, choices, given, layers
from dstrain.config.origins import flag_name
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
@click.option(
    "--of",
    "of_run",
    metavar="RUN",
    help="Show the plan of a run (its folder, or its name in runs/) beside what the run measured.",
)
@click.option(
    "--calibrate",
    is_flag=True,
    help="With --of: keep the utilisation that the run reached, for the time estimates of later plans on this machine.",
)
@click.option(
    "--forget-calibration",
    is_flag=True,
    help="Remove what --calibrate has kept of this machine's devices.",
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
    of_run: str | None,
    calibrate: bool,
    forget_calibration: bool,
    **flags: Any,
) -> None:
    """Show what `dstrain run` would do with the same arguments, without starting anything."""
    if of_run is not None or calibrate or forget_calibration:
        others = {
            "--fit": fit,
            "--explain": explained,
            "--device": device,
            "--gpus-per-node": gpus_per_node,
            "--config": config_file,
            "--recipe": recipe,
            "--set": settings,
            **{flag_name(key): True for key in given(flags)},
        }
        _refuse_beside(
            of_run, calibrate, forget_calibration, [flag for flag, value in others.items() if value]
        )
        _show_measured(of_run, calibrate=calibrate, as_json=as_json)
        return
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


def _refuse_beside(of_run: str | None, calibrate: bool, forget: bool, others: list[str]) -> None:
    """Refuse what can't stand beside --of, --calibrate and --forget-calibration. Raises DstrainError."""
    if forget and (of_run is not None or calibrate):
        others = [*(["--of"] if of_run is not None else []), *(["--calibrate"] if calibrate else []), *others]
    asked = "--forget-calibration" if forget else "--of" if of_run is not None else "--calibrate"
    if others:
        raise DstrainError(
            f"{asked} can't be combined with {others[0]}"
            + (": the plan of a run stands in its folder" if asked == "--of" else ""),
            where=others[0],
            hint="remove one of the two",
        )
    if calibrate and of_run is None:
        raise DstrainError(
            "--calibrate requires --of RUN, the run that measured",
            where="--calibrate",
            hint="dstrain plan --of RUN --calibrate",
        )


def _show_measured(of_run: str | None, *, calibrate: bool, as_json: bool) -> None:
    """The plan of a run beside what it measured; without a run what was kept is removed."""
    from dstrain.api import measured
    from dstrain.cli.showing.measured import show_forgotten, show_held_against

    if of_run is None:
        show_forgotten(measured.forget_calibrations(), as_json=as_json)
        return
    held = measured.measured(of_run)
    kept = measured.calibrate(held) if calibrate else None
    show_held_against(held, kept, as_json=as_json)
