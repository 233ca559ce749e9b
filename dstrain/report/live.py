"""One live line while a run goes on, read from its metrics.jsonl; plain lines without a terminal."""

from __future__ import annotations

import json
import os
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from dstrain.report.notes import Notes
from dstrain.runs.run_folder import RunFolder

# Without a terminal: about this many lines in a whole run, besides those with a validation loss.
_PLAIN_LINES = 20


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
        self._validation: float | None = None
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
            self._validation = record.get("validation_loss", self._validation)
            if record["step"] == 0:
                self._print(Text(f"step 0  validation loss {self._validation:.4f} before training"))
                continue
            self._seconds = [*self._seconds[-49:], record["seconds"]]
            self._tokens = (self._tokens[1], record["tokens"])
            line = self._line(record)
            if self._live:
                self._live.update(line)
                if "validation_loss" in record:
                    self._live.console.print(line)
            elif (
                record["step"] % self._every == 0
                or "validation_loss" in record
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

    def _line(self, record: dict[str, Any]) -> Text:
        mean = sum(self._seconds) / len(self._seconds)
        per_second = (self._tokens[1] - self._tokens[0]) / mean if mean and self._tokens[0] else None
        norm = record["grad_norm"]
        parts = [
            ("step ", "dim"), (f"{record['step']}/{self._steps}", "bold"),
            ("  loss ", "dim"), (f"{record['loss']:.4f}", "bold"),
            ("  validation ", "dim"), (f"{self._validation:.4f}" if self._validation is not None else "-", ""),
            ("  lr ", "dim"), (f"{record['lr']:.2e}", ""),
            ("  grad ", "dim"), (f"{norm:.3f}" if norm is not None else "overflow, skipped", ""),
            ("  tokens/s ", "dim"), (f"{per_second:,.0f}" if per_second else "-", ""),
            ("  left ", "dim"), (_duration((self._steps - record["step"]) * mean), ""),
        ]  # fmt: skip
        return Text.assemble(*parts)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
