"""The ``dstrain`` command group; each command is imported only when it is called."""

from __future__ import annotations

import importlib
import re
import signal
import sys

import click

from dstrain.cli.standard_streams import standard_streams
from dstrain.errors import RESUMABLE, DstrainError, os_error_shown, place_of
from dstrain.formatting import plain
from dstrain.stop_signals import WARNINGS, StoppedError, raised
from dstrain.version import __version__

# name -> (module, one line for --help): the line stands here so that help imports no command.
COMMANDS = {
    "run": ("dstrain.cli.run", "Train a model: plan, launch, monitor, and show the result."),
    "plan": (
        "dstrain.cli.plan",
        "Show what `run` would do with the same arguments, without starting anything.",
    ),
    "rehearse": (
        "dstrain.cli.rehearse",
        "Run a rank of a plan on a GPU that is not there: memory, messages, waits.",
    ),
    "submit": ("dstrain.cli.submit", "Write a Slurm batch script for a run, and submit it."),
    "resume": ("dstrain.cli.resume", "Resume a run from its newest complete checkpoint."),
    "verify": ("dstrain.cli.verify", "Train in one process and in other layouts, and compare the results."),
    "doctor": ("dstrain.cli.doctor", "Check the machines of a run, and suggest fixes for what is wrong."),
    "reproduce": ("dstrain.cli.reproduce", "Repeat a run, and compare it step by step, bit by bit."),
    "checkpoints": ("dstrain.cli.checkpoints", "List a run's checkpoints, and verify their checksums."),
    "export": ("dstrain.cli.export", "Export a run's model as a Hugging Face folder, and check it."),
    "merge": ("dstrain.cli.merge", "Merge an adapter into its model's weights."),
    "generate": ("dstrain.cli.generate", "Generate text from a prompt with an exported model."),
    "data": ("dstrain.cli.data", "Show what the model gets of the data."),
    "config": ("dstrain.cli.config", "Create, check, show and compare configurations."),
}

# What these are called for lies in a folder or with Slurm, and is as it should be where its display is not.
_NOT_FOR_THEIR_OUTPUT = ("run", "submit", "resume", "verify", "reproduce", "export", "merge")


_LONG_WORD = re.compile(r"\S{1000,}")


class LazyGroup(click.Group):
    """Imports a command when it is called, so that ``--help`` costs what click costs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _ = COMMANDS[cmd_name]
        command: click.Command = importlib.import_module(module).command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """click's own, with the nearest name for a mistyped one."""
        import difflib

        near = difflib.get_close_matches(args[0], COMMANDS, n=1) if args[0] not in COMMANDS else []
        if near:
            ctx.fail(f"no such command {args[0]!r}; did you mean {near[0]!r}?")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "--version", prog_name="dstrain")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.pass_context
def group(ctx: click.Context, debug: bool) -> None:
    """Train Hugging Face causal language models with DeepSpeed, in any layout, with the result of a single process.

    `dstrain run --zero 2 --pipeline 4` is a complete training run.
    """
    ctx.obj = {"debug": debug}


def main() -> None:
    """Entry point: errors that are for the user become one message and an exit code."""
    arguments = [word for word in sys.argv[1:] if word != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1  # wherever it stands: it is often added to the end
    command = next((word for word in arguments if word in COMMANDS), "")
    with standard_streams() as streams:
        with raised():
            code = _run(arguments, command, debug)
        if streams.lost_output is not None:
            _say(f"standard output: {streams.lost_output}: not all of it could be written")
            code = code or int(command not in _NOT_FOR_THEIR_OUTPUT)
    sys.exit(code)


def _run(arguments: list[str], command: str, debug: bool) -> int | str | None:
    """Run a command, and say what ended it; its exit code."""
    try:
        group.main(["--debug"] * debug + arguments, prog_name="dstrain", standalone_mode=False)
    except DstrainError as error:
        if debug:
            raise
        _say(str(error))
        return error.exit_code
    except OSError as error:
        if debug:
            raise
        _say(str(os_error_shown(error)))
        return 2
    except StoppedError as stop:
        _say(f"stopped by {signal.Signals(stop.number).name}")
        # The warning that the job's time is nearly over, outside of a training: come back later.
        return RESUMABLE if stop.number in WARNINGS else 128 + stop.number
    except click.exceptions.Abort:
        _say("stopped")
        return 130
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.ClickException as error:
        if isinstance(error, click.UsageError) and error.ctx is None:  # what the parser says names no command
            click.echo(f"Try '{f'dstrain {command}'.strip()} --help' for help.\n", err=True)
        error.show()
        return error.exit_code
    except SystemExit as end:
        return end.code
    except Exception as error:
        if debug:
            raise
        reason = f"{type(error).__name__}: {error}".strip().removesuffix(":")
        hint = "a fault of dstrain: please report it, with what `dstrain --debug ...` shows"
        _say(str(DstrainError(f"unexpected {reason}", where=place_of(error), hint=hint)))
        return 1
    return 0


def _say(message: str) -> None:
    # What the user typed or wrote may stand in it: nothing of that is for the terminal to carry out.
    message = _LONG_WORD.sub(lambda found: f"{found.group()[:300]}...", plain(message))
    click.echo(click.style("error: ", fg="red", bold=True) + message, err=True)


if __name__ == "__main__":
    main()
