"""``dstrain config check``: every mistake of a config file at once."""

from __future__ import annotations

import json
import sys

import click

from dstrain.errors import DstrainError


@click.command("check")
@click.argument("file")
@click.option("--recipe", metavar="NAME", help="A recipe that lies below FILE.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Laid over FILE, as for `run`.")
@click.option("--json", "as_json", is_flag=True, help="The mistakes as JSON.")
def command(file: str, recipe: str | None, settings: tuple[str, ...], as_json: bool) -> None:
    """Find every mistake in FILE that needs no model, no data and no machine to be seen.

    Unknown keys, wrong values, DeepSpeed's keys, and combinations that can't work. The exit code is 2 if there is one.
    """
    found = mistakes_in(file, recipe, settings)
    if as_json:
        record = [{"where": each.where, "message": each.message, "hint": each.hint} for each in found]
        click.echo(json.dumps(record, indent=2))
    else:
        for each in found:
            click.echo(click.style("error: ", fg="red", bold=True) + str(each), err=True)
        count = f"{len(found)} mistake{'s' if len(found) != 1 else ''}" if found else "no mistake"
        click.echo(f"{file}: {count}", err=bool(found))
    sys.exit(2 if found else 0)


def mistakes_in(file: str, recipe: str | None, settings: tuple[str, ...]) -> list[DstrainError]:
    """Every mistake of a config file, in the order of its lines. One that keeps it from being read stands alone."""
    from dstrain.config.loader import ConfigError, load_config
    from dstrain.planning.checks import refusals, refuse_batch
    from dstrain.planning.deepspeed.user_keys import mistakes

    try:
        resolved = load_config(recipe=recipe, config_file=file, settings=settings)
    except ConfigError as errors:
        # Combinations are not looked at: with the defaults in place of what is wrong they are not those of the file.
        return sorted([*errors.errors, *mistakes(errors.rest)], key=_line)
    except DstrainError as error:
        return [error]
    found = refusals(resolved)
    try:
        refuse_batch(resolved)
    except DstrainError as error:
        found.append(error)
    return sorted(found, key=_line)


def _line(error: DstrainError) -> tuple[str, int]:
    """The file and the line of an error; what has no line comes first."""
    file, _, line = (error.where or "").rpartition(":")
    return (file, int(line)) if line.isdecimal() else ("", 0)
