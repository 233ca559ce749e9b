"""``dstrain checkpoints RUN``: lists the checkpoints of a run, and verifies them."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dstrain.cli.once_options import OnceOptions
from dstrain.strict_json import to_json

if TYPE_CHECKING:
    from dstrain.api.checkpoint_list import CheckpointInfo


@click.command("checkpoints", cls=OnceOptions)
@click.argument("run")
@click.option("--verify", is_flag=True, help="Read all files, and compare them with their checksums.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def command(run: str, verify: bool, as_json: bool) -> None:
    """List the checkpoints of RUN (a run folder, or its name in runs/).

    Without --verify, only manifests and file sizes are checked. The exit code is 1 if a checkpoint is damaged.
    --verify records damage in the checkpoint, so that `dstrain resume` skips it without reading it again.
    """
    from dstrain.api.checkpoint_list import DAMAGED, checkpoints
    from dstrain.api.resuming import find_run
    from dstrain.cli.showing.progress import PROGRESS

    name = find_run(run).name
    with _Progress() as progress:
        found = checkpoints(run, verify=verify, on_bytes=progress.update, events=PROGRESS)
    if as_json:
        records = [asdict(info) for info in found]
        click.echo(to_json({"run": name, "verified": verify, "checkpoints": records}, indent=2))
    elif not found:
        click.echo(f"{name} has no checkpoint")
    else:
        _show(name, found)
    if any(info.state == DAMAGED for info in found):
        sys.exit(1)


class _Progress:
    """A progress bar for each checkpoint whose bytes are read."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._bar: Any = None

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)

    def update(self, path: Path, read: int, total: int) -> None:
        if path != self._path:
            self.__exit__()
            label = f"reading {path.name}"
            self._path, self._bar = (
                path,
                click.progressbar(length=total, label=label, width=0, file=sys.stderr),
            )
            self._bar.__enter__()
        self._bar.update(read)


def _show(name: str, found: Sequence[CheckpointInfo]) -> None:
    from rich.box import HEAVY_HEAD
    from rich.text import Text

    from dstrain.api.checkpoint_list import COMPLETE, DAMAGED, HALF_WRITTEN
    from dstrain.cli.showing.tables import Column, FoldingTable, make_console
    from dstrain.formatting import format_bytes

    table = FoldingTable(
        Column("step", right=True),
        Column("size", right=True),
        Column("layout", gives=True),
        Column("loss", right=True),
        Column("saved at"),
        Column("state", gives=True),
        lines=HEAVY_HEAD,
    )
    styles = {COMPLETE: "green", DAMAGED: "red", HALF_WRITTEN: "yellow"}
    for info in found:
        state = info.state
        told = f"{state}: {info.why}" if info.why else state
        if state == COMPLETE and not info.checksums:
            told += " (written by an older dstrain without checksums: sizes only)"
        saved_at = info.saved_at
        table.add_row(
            str(info.step),
            format_bytes(info.bytes),
            info.layout or "-",
            f"{info.loss:.4f}" if info.loss is not None else "-",
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(saved_at)) if saved_at else "-",
            Text(told, style=styles[state]),
        )
    console = make_console()
    console.print(Text(f"checkpoints of {name}", style="bold"))
    console.print(table)
    for info in found:
        if info.unknown_files:
            names = ", ".join(info.unknown_files)
            console.print(
                f"step {info.step} contains files that are not in its manifest and are ignored: {names}",
                soft_wrap=True,
            )
