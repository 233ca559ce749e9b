"""``dstrain data``: tokenizes data ahead, and shows what the model gets of them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from dstrain.cli.options import GroupedOptions, choices, given, layers
from dstrain.config.text_file import shown
from dstrain.errors import DstrainError, way_out
from dstrain.strict_json import to_json


@click.group("data")
def command() -> None:
    """Prepare data, and show what the model gets of them: which tokens are trained, and how samples are filled."""


def _looked_at(
    recipe: str | None,
    config_file: str | None,
    settings: tuple[str, ...],
    flags: dict[str, Any],
    samples: range,
    each_token: bool = False,
) -> dict[str, Any]:
    from dstrain.api.data_samples import data_samples
    from dstrain.api.planning import load_config
    from dstrain.cli.showing.progress import PROGRESS

    config = load_config(config_file, recipe=recipe, settings=settings, flags=given(flags))
    return data_samples(config, samples, each_token=each_token, events=PROGRESS)


@click.command("show", cls=GroupedOptions)
@layers
@choices
@click.option(
    "-n", "--n", "count", type=click.IntRange(1), default=3, show_default=True, help="Number of samples."
)
@click.option(
    "--from", "first", type=click.IntRange(0), default=0, show_default=True, help="The first sample."
)
@click.option("--json", "as_json", is_flag=True, help="Print the samples as JSON.")
@click.option("--html", "page", metavar="FILE", help="Write them to a page with every token, for a browser.")
def show(
    recipe: str | None,
    config_file: str | None,
    settings: tuple[str, ...],
    count: int,
    first: int,
    as_json: bool,
    page: str | None,
    **flags: Any,
) -> None:
    """Show training samples as the model gets them, and which of their tokens count in the loss."""
    if as_json and page:
        raise DstrainError(
            "--json and --html can't be given together", where="--html", hint="remove one of them"
        )
    samples = range(first, first + count)
    found = _looked_at(recipe, config_file, settings, flags, samples, each_token=page is not None)
    if page:
        from dstrain.cli.showing.samples_page import samples_page

        try:
            Path(page).write_text(samples_page(found["samples"], found["statistics"]), encoding="utf-8")
        except OSError as error:
            raise DstrainError(
                f"the page can't be written: {error.strerror}", where=page, hint=way_out(error)
            ) from error
        click.echo(f"{len(found['samples'])} samples written to {shown(page)}")
        return
    if as_json:
        click.echo(to_json(found["samples"], indent=2))
        return
    from dstrain.cli.showing.samples import show_samples
    from dstrain.cli.showing.tables import make_console

    show_samples(found["samples"], found["statistics"], make_console())


@click.command("stats", cls=GroupedOptions)
@layers
@choices
@click.option("--json", "as_json", is_flag=True, help="Print the statistics as JSON.")
def stats(
    recipe: str | None, config_file: str | None, settings: tuple[str, ...], as_json: bool, **flags: Any
) -> None:
    """Show statistics of the data: documents, their lengths, trained tokens, and how full samples are."""
    found = _looked_at(recipe, config_file, settings, flags, range(0))["statistics"]
    if as_json:
        click.echo(to_json(found, indent=2))
        return
    from dstrain.cli.showing.samples import show_statistics
    from dstrain.cli.showing.tables import make_console

    show_statistics(found, make_console())


@click.command("prepare", cls=GroupedOptions)
@layers
@choices
@click.option(
    "--workers",
    type=click.IntRange(0),
    metavar="N",
    help="Processes that tokenize; 0: one alone. By default one for each core, where there is enough to do.",
)
@click.option("--json", "as_json", is_flag=True, help="Print what was prepared as JSON.")
def prepare(
    recipe: str | None,
    config_file: str | None,
    settings: tuple[str, ...],
    workers: int | None,
    as_json: bool,
    **flags: Any,
) -> None:
    """Tokenize the data into the cache that a run uses. No device is needed; a run does the same by itself."""
    from dstrain.api.data_samples import prepare_ahead
    from dstrain.api.planning import load_config
    from dstrain.cli.showing.prepared import print_prepared
    from dstrain.cli.showing.progress import PROGRESS

    config = load_config(config_file, recipe=recipe, settings=settings, flags=given(flags))
    found = prepare_ahead(config, workers=workers, events=PROGRESS)
    if as_json:
        click.echo(to_json([asdict(source) for source in found], indent=2))
    else:
        print_prepared(found)


command.add_command(prepare)
command.add_command(show)
command.add_command(stats)
