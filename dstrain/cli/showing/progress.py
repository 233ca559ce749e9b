"""Progress of a run on the terminal: one live line, or plain lines without a terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from dstrain.api.events import Events, Step
from dstrain.api.outcome import RunResult
from dstrain.cli.showing.measured import summary_of
from dstrain.cli.showing.plan import show_plan
from dstrain.cli.standard_streams import wait_for_readers
from dstrain.errors import DstrainError
from dstrain.planning.plan import Plan
from dstrain.report.measured import hold_against
from dstrain.runs.run_folder import RunFolder

# Without a terminal: about this many lines in a whole run, besides those with a validation loss.
_PLAIN_LINES = 20
# For a reader who stands still while ranks train: a stop, and a failure, must be seen meanwhile.
_READER_SECONDS = 2.0
# What a narrow terminal does without first. Step and loss stay.
_LEFT_OUT = ("lr", "tokens/s", "grad", "left", "validation")


class ProgressEvents(Events):
    """Shows only how far the work has come, on standard error: for commands whose output is their result."""

    def note(self, text: str, topic: str = "note") -> None:
        sys.stderr.write(f"dstrain: {text}\n")
        sys.stderr.flush()


PROGRESS = ProgressEvents()


class ConsoleEvents(ProgressEvents):
    """Shows a run on the terminal. Use as a context: at its end nothing is left live.

    Args:
        verbose: show the whole plan, not its summary.
        plans: show plans at all.
    """

    def __init__(self, console: Console, *, verbose: bool = False, plans: bool = True) -> None:
        self._console = console
        self._verbose = verbose
        self._plans = plans
        self._steps = 0
        self._live: Live | None = None
        self._validation: float | None = None
        self._line: dict[str, Text] | None = None
        self._shown: int | None = None
        self._seconds: list[float] = []
        self._tokens = (0, 0)

    def __enter__(self) -> ConsoleEvents:
        return self

    def __exit__(self, *exception: object) -> None:
        self._end_live()
        wait_for_readers(None)

    def planned(self, plan: Plan) -> None:
        self._steps = plan.run_config.steps
        if self._plans:
            show_plan(plan, self._console, verbose=self._verbose)

    def started(self, folder: Path, command: str) -> None:
        self._end_live()
        wait_for_readers(_READER_SECONDS)
        show_command(command, self._console)
        if self._console.is_terminal:
            self._live = Live(Text("starting the ranks ..."), console=self._console, refresh_per_second=4)
            self._live.__enter__()
        else:
            self._print(Text("starting the ranks ..."))

    def step(self, step: Step) -> None:
        self._seconds = [*self._seconds[-49:], step.seconds]
        self._tokens = (self._tokens[1], step.tokens)
        self._validation = step.metrics.get("validation_loss", self._validation)
        self._line = self._parts(step)
        if self._live:
            self._live.update(_within(self._line, self._console.width))
        elif step.step % max(1, self._steps // _PLAIN_LINES) == 0 or step.step == self._steps:
            self._print_line(step.step)

    def validated(self, step: int, loss: float, losses: Mapping[str, float]) -> None:
        self._validation = loss
        if step == 0 or self._line is None:
            self._print(Text(f"step {step}  validation loss {loss:.4f} before training"))
        else:
            self._print_line(step)
        if losses:
            self._print(Text.assemble(("validation ", "dim"), _by_set(losses)))

    def note(self, text: str, topic: str = "note") -> None:
        if topic == "progress":
            super().note(text, topic)
        elif topic == "failed":
            self._print(Text(text))
        else:
            self._print(Text.assemble((f"{topic:<6} ", "bold"), text))

    def ended(self, result: RunResult) -> None:
        self._end_live()
        wait_for_readers(None)
        if result.completed and RunFolder(result.folder).result.exists():
            show_result(result, self._console)

    def _print_line(self, step: int) -> None:
        """The line of a step, once."""
        if self._line is not None and self._shown != step:
            self._shown = step
            self._print(_joined(self._line))

    def _print(self, line: Text) -> None:
        (self._live.console if self._live else self._console).print(line, soft_wrap=True)

    def _end_live(self) -> None:
        if self._live:
            live, self._live = self._live, None
            live.__exit__(None, None, None)

    def _parts(self, step: Step) -> dict[str, Text]:
        """What is known of a step, by what it is called, in the order in which it is shown."""
        mean = sum(self._seconds) / len(self._seconds)
        per_second = (self._tokens[1] - self._tokens[0]) / mean if mean and self._tokens[0] else None
        values = {
            "step": Text(f"{step.step}/{self._steps}", style="bold"),
            "loss": Text(f"{step.loss:.4f}", style="bold"),
            "validation": Text(f"{self._validation:.4f}" if self._validation is not None else "-"),
            "lr": Text(f"{step.lr:.2e}"),
            "grad": Text(f"{step.grad_norm:.3f}" if step.grad_norm is not None else "overflow, skipped"),
            "tokens/s": Text(f"{per_second:,.0f}" if per_second else "-"),
            "left": Text(_duration((self._steps - step.step) * mean)),
        }
        return {name: Text.assemble((f"{name} ", "dim"), value) for name, value in values.items()}


def _by_set(losses: Mapping[str, float]) -> str:
    """The losses of validation sets, in one line."""
    return "  ".join(f"{name} {loss:.4f}" for name, loss in losses.items())


def show_command(command: str, console: Console) -> None:
    """The shell command that starts the ranks."""
    console.print(Text.assemble(("command  ", "bold"), command), soft_wrap=True)


def show_result(result: RunResult, console: Console) -> None:
    """Of a run that was trained to its end."""
    folder = RunFolder(result.folder)
    if result.validation_loss is not None:
        of_all = " (mean over the label tokens of all sets)" if result.validation_losses else ""
        console.print(Text.assemble(("validation loss  ", "bold"), f"{result.validation_loss:.4f}{of_all}"))
        if result.validation_losses:
            console.print(Text(_by_set(result.validation_losses)))
    if result.continuation:
        console.print(Text.assemble(("the model continues ", "bold"), repr(result.prompt)))
        console.print(Text(result.continuation, style="cyan"))
    with suppress(DstrainError, OSError):  # the run itself is what counts
        summary = summary_of(hold_against(folder))
        text = f"{summary}; dstrain plan --of {folder.path} has more"
        console.print(Text.assemble((f"{'measured':<11}", "bold"), text), soft_wrap=True)
    rows: Mapping[str, Any] = {
        "run folder": folder.path,
        "metrics": folder.metrics,
        "checkpoint": result.checkpoint,
        "logs": folder.logs,
    }
    for label, path in rows.items():
        if path is not None:
            console.print(Text.assemble((f"{label:<11}", "bold"), str(path)), soft_wrap=True)


def _joined(parts: Mapping[str, Text]) -> Text:
    return Text("  ").join(parts.values())


def _within(parts: Mapping[str, Text], width: int) -> Text:
    """The parts that a line of the terminal holds. One that it does not is left out as a whole: half a number lies."""
    kept = dict(parts)
    for name in _LEFT_OUT:
        if _joined(kept).cell_len <= width:
            break
        kept.pop(name, None)
    return _joined(kept)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
