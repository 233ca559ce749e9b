"""Arguments of the command line in layers: what a file's tests have in common, and what one of them changes."""

from __future__ import annotations

from collections.abc import Sequence

import click

from dstrain.cli.main import COMMANDS, group


def layered(arguments: Sequence[str]) -> list[str]:
    """Of an option that is given twice, the last alone: the command line would refuse both."""
    once = _options_that_count_once(arguments)
    words: list[list[str]] = []  # an option and its value, or another word
    for word in arguments:
        if words and len(words[-1]) == 1 and once.get(words[-1][0]) == "value":
            words[-1].append(word)
            continue
        name = word.partition("=")[0]
        if name in once:
            words = [each for each in words if each[0].partition("=")[0] != name]
        words.append([word])
    return [part for each in words for part in each]


def _options_that_count_once(arguments: Sequence[str]) -> dict[str, str]:
    """By name: whether they take a value."""
    context = click.Context(group)
    names = [word for word in arguments if word in COMMANDS][:1]
    command = group.get_command(context, names[0]) if names else None
    if isinstance(command, click.Group):
        inner = [word for word in arguments if word in command.commands][:1]
        command = command.commands[inner[0]] if inner else None
    found = {}
    for option in command.params if command is not None else []:
        if isinstance(option, click.Option) and not option.multiple:
            kind = "flag" if option.is_flag else "value"
            found |= dict.fromkeys((*option.opts, *option.secondary_opts), kind)
    return found
