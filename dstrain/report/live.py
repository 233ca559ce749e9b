"""One live line while a run goes on, read from its metrics.jsonl; plain lines without a terminal."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from dstrain.plan.run_folder import RunFolder
from dstrain.report.notes import Notes

# Without a terminal: about this many lines in a whole run, besides those with a held-out loss.
_PLAIN_LINES = 20
# What a narrow terminal does without first. Step and loss stay.
_LEFT_OUT = ("lr", "tokens/s", "grad", "left", "held-out")


class LiveLine:
    """Follows the metrics file of a run. Use as a context; call `update` every now and then."""

    def __init__(self, folder: RunFolder, console: Console, *, steps: int) -> None:
        self._path = folder.metrics
        self._notes = Notes(folder.launcher_log)
        self._console = console
        self._steps = steps
        self._every = max(1, steps // _PLAIN_LINES)
        # A resumed run writes the file anew, without the steps that it will repeat: what stood there
        # before is known by its lines, since the new file may be as long as the old one when it is read.
        old = self._path.read_bytes() if self._path.exists() else b""
        self._old = frozenset(old.split(b"\n"))
        self._file: int | None = None
        self._position = 0
        self._rest = b""
        self._held_out: float | None = None
        self._seconds: list[float] = []
        self._tokens = (0, 0)
        self._live = (
            Live(Text("starting the ranks ..."), console=console, refresh_per_second=4)
            if (console.is_terminal)
            else None
        )

    def __enter__(self) -> LiveLine:
        if self._live:
            self._live.__enter__()
        else:
            self._console.print("starting the ranks ...")
        return self

    def __exit__(self, *exception: Any) -> None:
        self.update()
        if self._live:
            self._live.__exit__(*exception)

    def update(self) -> None:
        """Show what has come since the last call."""
        for note in self._notes.new():
            self._print(Text(f"note   {note}"))
        for record in self._new_records():
            self._held_out = record.get("held_out_loss", self._held_out)
            if record["step"] == 0:
                self._print(Text(f"step 0  held-out loss {self._held_out:.4f} before training"))
                continue
            self._seconds = [*self._seconds[-49:], record["seconds"]]
            self._tokens = (self._tokens[1], record["tokens"])
            parts = self._parts(record)
            line = _joined(parts)
            if self._live:
                self._live.update(_within(parts, self._console.width))
                if "held_out_loss" in record:
                    self._print(line)
            elif (
                record["step"] % self._every == 0
                or "held_out_loss" in record
                or record["step"] == self._steps
            ):
                self._console.print(line, soft_wrap=True)

    def _print(self, line: Text) -> None:
        (self._live.console if self._live else self._console).print(line, soft_wrap=True)

    def _new_records(self) -> list[dict[str, Any]]:
        """Whole lines that were not there at the start, and were not read before."""
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return []
        with file:
            inode = os.fstat(file.fileno()).st_ino
            if inode != self._file:
                self._file, self._position, self._rest = inode, 0, b""
            file.seek(self._position)
            new = file.read()
        self._position += len(new)
        *lines, self._rest = (self._rest + new).split(b"\n")
        return [json.loads(line) for line in lines if line not in self._old and line]

    def _parts(self, record: dict[str, Any]) -> dict[str, Text]:
        """What is known of a step, by what it is called, in the order in which it is shown."""
        mean = sum(self._seconds) / len(self._seconds)
        per_second = (self._tokens[1] - self._tokens[0]) / mean if mean and self._tokens[0] else None
        norm = record["grad_norm"]
        values = {
            "step": Text(f"{record['step']}/{self._steps}", style="bold"),
            "loss": Text(f"{record['loss']:.4f}", style="bold"),
            "held-out": Text(f"{self._held_out:.4f}" if self._held_out is not None else "-"),
            "lr": Text(f"{record['lr']:.2e}"),
            "grad": Text(f"{norm:.3f}" if norm is not None else "overflow, skipped"),
            "tokens/s": Text(f"{per_second:,.0f}" if per_second else "-"),
            "left": Text(_duration((self._steps - record["step"]) * mean)),
        }
        return {name: Text.assemble((f"{name} ", "dim"), value) for name, value in values.items()}


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
