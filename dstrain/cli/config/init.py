"""``dstrain config init``: a commented YAML to start from."""

from __future__ import annotations

from pathlib import Path

import click

from dstrain.errors import DstrainError


@click.command("init")
@click.argument("file", default="dstrain.yaml")
def command(file: str) -> None:
    """Write a commented YAML with every key and its default to FILE (dstrain.yaml; - for the terminal)."""
    from dstrain.config.template import template

    if file == "-":
        click.echo(template(), nl=False)
        return
    path = Path(file)
    try:
        with path.open("x", encoding="utf-8") as opened:
            opened.write(template())
    except FileExistsError:
        raise DstrainError(
            f"{path} exists, and is not overwritten",
            where="FILE",
            hint="name another file, or - to only see it",
        ) from None
    except OSError as error:
        raise DstrainError(
            f"can't write {path}: {error.strerror}", where="FILE", hint="name a file in a folder of yours"
        ) from None
    click.echo(f"{path}: change what you need, then `dstrain config check {path}`")
