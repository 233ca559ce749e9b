"""``dstrain config``: make, check, describe, show and compare configurations."""

from __future__ import annotations

import click

from dstrain.cli.config import check, diff, init, schema, show


@click.group("config")
def command() -> None:
    """Make, check, describe, show and compare configurations."""


for each in (init, check, schema, show, diff):
    # click would cut the sentence off where the line ends.
    each.command.short_help = (each.command.help or "").partition("\n")[0]
    command.add_command(each.command)
