"""Command-line options: one per key of `RunConfig`, and those that select a recipe and a file."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click
from pydantic import BaseModel

from dstrain.cli.once_options import OnceOptions
from dstrain.config.origins import FLAGS_OF_SECTIONS, REPEATED, flag_name
from dstrain.config.schema import RunConfig
from dstrain.config.template import GROUPS
from dstrain.config.value_types import LARGEST
from dstrain.lora import Adapter

_SECTIONS: dict[str, type[BaseModel]] = {"adapter": Adapter}
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

# Mappings and lists of mappings have no form on a command line but --set.
_WITHOUT_FLAG = (
    "deepspeed",
    "communication_timeout",
    "data_options",
    "data_fields",
    "data_phases",
    "loss_options",
    "optimizer_options",
    "lr_schedule_options",
    "profile",
)


if TYPE_CHECKING:
    _ParamType = click.ParamType[Any]  # generic from click 8.2 on
else:
    _ParamType = click.ParamType


class _StepsOrTime(_ParamType):
    """Digits are steps; anything else is left to the config, which knows a length of time."""

    name = "steps|time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return int(value) if isinstance(value, str) and re.fullmatch("-?[0-9]+", value) else value


class _ListOf(_ParamType):
    """Comma-separated values."""

    def __init__(self, kind: _ParamType) -> None:
        self.kind = kind
        self.name = f"{kind.name},..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        return [self.kind.convert(part, param, ctx) for part in value.split(",")]


class GroupedOptions(OnceOptions):
    """A command whose ``--help`` has a section for each group of run-config keys, its own options first."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        titles = {
            flag: title
            for title, keys in _groups().items()
            for key in keys
            for flag in (key, *FLAGS_OF_SECTIONS.get(key, ()))
        }
        sections: dict[str, list[tuple[str, str]]] = {"Options": [], **{title: [] for title in _groups()}}
        for parameter in self.get_params(ctx):
            line = parameter.get_help_record(ctx)
            if line is not None:
                sections[titles.get(str(parameter.name), "Options")].append(line)
        for title, lines in sections.items():
            if lines:
                with formatter.section(title.rstrip(".")):
                    formatter.write_dl(lines)


def choices(function: Callable[..., Any]) -> Callable[..., Any]:
    """All flags that set run-config keys; the command gets them as ``**flags``."""
    function = click.option(
        "--set",
        "settings",
        multiple=True,
        metavar="KEY=VALUE",
        help="Set any config key; deepspeed.A.B=VALUE sets a DeepSpeed key. Repeatable.",
    )(function)
    for key, field in reversed(RunConfig.model_fields.items()):
        if key in FLAGS_OF_SECTIONS:
            function = _options_of_section(key)(function)
        elif key not in _WITHOUT_FLAG:
            function = _option(key, field.annotation, field.metadata, field.description or "")(function)
    return function


def layers(function: Callable[..., Any]) -> Callable[..., Any]:
    """Where a config starts from: a recipe, a file."""
    function = click.option("--config", "config_file", metavar="FILE", help="YAML config file.")(function)
    return click.option(
        "--recipe",
        metavar="NAME",
        help="Recipe from ds_configs/recipes. Default: quickstart; fine-tune with --init pretrained.",
    )(function)


def node_rank_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Which node a command is typed on: of the one who types, not of the run."""
    return click.option(
        "--node-rank",
        type=click.IntRange(0),
        help="With --launcher none: number of this node, from 0. Without it: prepare the run, and print the commands.",
    )(function)


def trust_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Of the one who types the command: no config can set it."""
    return click.option(
        "--trust",
        is_flag=True,
        help="Import the code that the run folder names, though it belongs to another user.",
    )(function)


def given(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags that were given."""
    return {key: value for key, value in flags.items() if value is not None}


def _groups() -> dict[str, list[str]]:
    """The run-config keys below each heading."""
    found: dict[str, list[str]] = {}
    title = ""
    for key in RunConfig.model_fields:
        title = GROUPS.get(key, title)
        found.setdefault(title, []).append(key)
    return found


def _options_of_section(section: str) -> Decorator:
    """The flags of some of a section's keys."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        for flag, key in reversed(FLAGS_OF_SECTIONS[section].items()):
            field = _SECTIONS[section].model_fields[key]
            text = f"{section.capitalize()}: {field.description}"
            if flag == section:
                text = RunConfig.model_fields[section].description or ""
                kind: Any = click.Choice([*typing.get_args(field.annotation), "none"])
                function = click.option(flag_name(flag), flag, type=kind, default=None, help=_sentence(text))(
                    function
                )
            else:
                function = _option(flag, field.annotation, field.metadata, text)(function)
        return function

    return add


def _sentence(text: str) -> str:
    text = text[:1].upper() + text[1:]
    return text if text.endswith(".") else f"{text}."


def _option(key: str, annotation: Any, metadata: list[Any], description: str) -> Decorator:
    """The flag of one key. One that is not given stays None, and lays nothing over the file."""
    text = _sentence(description)
    if key in REPEATED:
        return click.option(
            flag_name(key),
            key,
            multiple=True,
            callback=lambda context, option, value: list(value) or None,
            metavar="NAME",
            help=f"{text} Repeatable.",
        )
    kind = _kind(annotation, metadata)
    if kind is bool:
        return click.option(f"{flag_name(key)}/{flag_name('no_' + key)}", key, default=None, help=text)
    return click.option(flag_name(key), key, type=kind, default=None, help=text)


def _kind(annotation: Any, metadata: list[Any]) -> Any:
    """click's type for a key's annotation."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _kind(parts[0], [*parts[1:], *metadata])
    if origin in (typing.Union, types.UnionType):
        # A list of sources is for files and --set: the flag takes the single one.
        kinds = [part for part in parts if part is not type(None) and typing.get_origin(part) is not list]
        return _kind(kinds[0], metadata) if len(kinds) == 1 else _StepsOrTime()
    if origin is typing.Literal:
        if all(isinstance(part, int) for part in parts):
            return click.IntRange(min(parts), max(parts))
        return click.Choice(list(parts))
    if origin is list:
        return _ListOf(click.types.convert_type(_kind(parts[0], metadata)))
    if annotation is int:
        return click.IntRange(*_bounds(metadata))
    return annotation


def _bounds(metadata: list[Any]) -> tuple[int | None, int | None]:
    """The least and the largest integer. A bound that only catches slips is left to the config."""
    least = most = None
    for each in metadata:
        for limit in getattr(each, "metadata", (each,)):
            if getattr(limit, "ge", None) is not None:
                least = limit.ge
            if getattr(limit, "gt", None) is not None:
                least = limit.gt + 1
            if getattr(limit, "le", None) is not None and limit.le < LARGEST:
                most = limit.le
    return least, most
