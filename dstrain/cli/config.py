"""``dstrain config``: creates, checks, shows and compares configurations."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dstrain.cli.once_options import OnceOptions
from dstrain.cli.options import GroupedOptions, choices, given, layers
from dstrain.errors import DstrainError
from dstrain.strict_json import to_json

if TYPE_CHECKING:
    from dstrain.report.difference import Difference, Side, Value


_TITLES = {
    "config": "config",
    "deepspeed": "DeepSpeed keys",
    "layout": "layout",
    "batch": "batch",
    "model": "model",
    "data": "data",
    "versions": "versions",
}


@click.group("config")
def command() -> None:
    """Create, check, show and compare configurations."""


@click.command("init", cls=OnceOptions)
@click.argument("file", default="dstrain.yaml")
def init(file: str) -> None:
    """Write a commented YAML file with every key and its default to FILE (dstrain.yaml; - for standard output)."""
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
            f"{path} already exists and is not overwritten",
            where="FILE",
            hint="name another file, or use - to print to the terminal",
        ) from None
    except OSError as error:
        raise DstrainError(
            f"can't write {path}: {error.strerror}",
            where="FILE",
            hint="name a file in a folder that you can write to",
        ) from None
    click.echo(f"wrote {path}; edit it, then run `dstrain config check {path}`")


@click.command("check", cls=OnceOptions)
@click.argument("file")
@click.option("--recipe", metavar="NAME", help="Recipe that FILE is applied on top of.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a key of FILE, as with `run`. Repeatable.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the errors as JSON.")
def check(file: str, recipe: str | None, settings: tuple[str, ...], as_json: bool) -> None:
    """Report all errors in FILE that can be found without the model, the data and the machines.

    Finds unknown keys, invalid values, errors in DeepSpeed keys, and invalid combinations. The exit code is 2 if there
    are any.
    """
    found = mistakes_in(file, recipe, settings)
    if as_json:
        record = [{"where": each.where, "message": each.message, "hint": each.hint} for each in found]
        click.echo(to_json(record, indent=2))
    else:
        for each in found:
            click.echo(click.style("error: ", fg="red", bold=True) + str(each), err=True)
        count = f"{len(found)} error{'s' if len(found) != 1 else ''}" if found else "no errors"
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


@click.command("schema", cls=OnceOptions)
def schema() -> None:
    """Print the JSON Schema (draft 2020-12) of config files, including DeepSpeed keys.

    For completion in an editor, run `dstrain config schema > FILE` and start the config file with the line
    `# yaml-language-server: $schema=FILE`.
    """
    from dstrain.config.json_schema import json_schema

    click.echo(to_json(json_schema(), indent=1, ascii_only=False))


@click.command("show", cls=GroupedOptions)
@layers
@choices
@click.option("--origins", is_flag=True, help="Show the origin of every key.")
def show(
    recipe: str | None, config_file: str | None, settings: tuple[str, ...], origins: bool, **flags: Any
) -> None:
    """Print the final DeepSpeed JSON for these arguments."""
    from dstrain.api.planning import plan_for
    from dstrain.cli.showing.progress import PROGRESS
    from dstrain.cli.showing.tables import Column, FoldingTable, make_console
    from dstrain.config.loader import load_config
    from dstrain.config.values import leaves

    resolved = load_config(recipe=recipe, config_file=config_file, settings=settings, flags=given(flags))
    plan = plan_for(resolved, events=PROGRESS).plan
    if not origins:
        click.echo(to_json(plan.deepspeed, indent=2))
        return
    table = FoldingTable(Column(gives=True), Column(gives=True), Column(gives=True))
    for path, value in leaves(plan.deepspeed):
        key = ".".join(path)
        table.add_row(key, to_json(value), plan.deepspeed_origins[key])
    make_console(whole_lines=True).print(table)


@click.command("diff", cls=OnceOptions)
@click.argument("run_a")
@click.argument("run_b")
@click.option("--json", "as_json", is_flag=True, help="Print the differences as JSON.")
def diff(run_a: str, run_b: str, as_json: bool) -> None:
    """Show what differs between RUN_A and RUN_B: run folders, names in runs/, or YAML files.

    Compares config keys with their origins; for two run folders also DeepSpeed keys, layout, batch, model, data and
    versions.

    The exit code is 0 if nothing differs, 1 if something does, 2 for errors.
    """
    from dstrain.report.difference import differences

    found = differences(_side(run_a), _side(run_b))
    if as_json:
        click.echo(to_json([asdict(each) for each in found], indent=2))
    else:
        _show_differences(found)
    sys.exit(1 if found else 0)


def _side(name: str) -> Side:
    """What ``name`` means: a YAML file, a run folder, or a run's name. Raises DstrainError."""
    from dstrain.api.resuming import find_run
    from dstrain.config.loader import load_config, read_config
    from dstrain.report.difference import chosen, followed

    path = Path(name)
    if path.is_file():
        return chosen(load_config(config_file=name))
    if path.suffix in (".yaml", ".yml"):
        raise DstrainError(f"there is no file {name}", where="RUN", hint="check the path")
    folder = find_run(name)
    here, config = Path.cwd(), folder.config
    place = str(config.relative_to(here) if config.is_relative_to(here) else config)
    return followed(folder, read_config(config, name=place), place)


def _show_differences(found: Sequence[Difference]) -> None:
    """A block for each part: key, value of one side, value of the other, each with its origin."""
    from rich.padding import Padding

    from dstrain.cli.showing.tables import Column, FoldingTable, make_console

    console = make_console(whole_lines=True)
    if not found:
        console.print("no differences")
    for part, title in _TITLES.items():
        rows = [each for each in found if each.part == part]
        if rows:
            table = FoldingTable(Column(gives=True), Column(gives=True), Column(), Column(gives=True))
            for each in rows:
                table.add_row(each.key, _value(each.a), "|", _value(each.b))
            console.print(title)
            console.print(Padding.indent(table, 2))


def _value(value: Value) -> str:
    if value.value is None and value.origin is None:
        return "-"
    return to_json(value.value, ascii_only=False) + (f" ({value.origin})" if value.origin else "")


for each in (init, check, schema, show, diff):
    # click would cut the sentence off where the line ends.
    each.short_help = (each.help or "").partition("\n")[0]
    command.add_command(each)
