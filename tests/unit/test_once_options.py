"""An option that is given twice where only one of its values would count, of every command."""

from __future__ import annotations

from collections.abc import Iterator

import click
import pytest

from dstrain.cli.main import COMMANDS, group


def options() -> Iterator[tuple[str, click.Command, click.Option]]:
    context = click.Context(group)
    for name in COMMANDS:
        found = group.get_command(context, name)
        commands = found.commands.values() if isinstance(found, click.Group) else [found]
        for command in commands:
            assert command is not None
            for parameter in command.params:
                if isinstance(parameter, click.Option):
                    yield f"{name} {command.name} {parameter.opts[0]}", command, parameter


ALL = list(options())


@pytest.mark.parametrize(("command", "option"), [row[1:] for row in ALL], ids=[row[0] for row in ALL])
def test_no_value_is_dropped_without_a_word(command: click.Command, option: click.Option) -> None:
    name = option.opts[0]
    once = [name] if option.is_flag else [f"{name}=1"]
    arguments = [str(number) for number in range(sum(isinstance(p, click.Argument) for p in command.params))]
    refusal = rf"{name} is given 2 times, and only one counts"
    if option.multiple or (option.is_flag and not option.secondary_opts):
        try:
            command.make_context("x", [*arguments, *once, *once])
        except click.BadParameter as error:
            pytest.fail(str(error))
        return
    with pytest.raises(click.UsageError, match=refusal):
        command.make_context("x", [*arguments, *once, *once])
    if option.secondary_opts:
        with pytest.raises(click.UsageError, match=refusal):
            command.make_context("x", [*arguments, *once, option.secondary_opts[0]])
