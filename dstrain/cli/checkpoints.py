"""``dstrain checkpoints RUN``: what a run has saved, and whether it is whole."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from dstrain.plan.run_folder import RunFolder

COMPLETE, DAMAGED, HALF_WRITTEN = "complete", "damaged", "half-written"


@click.command("checkpoints")
@click.argument("run")
@click.option("--verify", is_flag=True, help="Read all bytes, and compare them with the checksums.")
@click.option("--json", "as_json", is_flag=True, help="The same as JSON.")
def command(run: str, verify: bool, as_json: bool) -> None:
    """List the checkpoints of RUN (a run folder, or its name below runs/).

    Without --verify only manifests and the sizes of files are looked at. The exit code is 1 if a checkpoint
    is damaged. What --verify finds is noted in the checkpoint: `dstrain resume` then passes over it at once.
    """
    from dstrain.cli.resume import find_run

    folder = find_run(run)
    records = _records(folder, verify=verify)
    if as_json:
        click.echo(json.dumps({"run": folder.name, "verified": verify, "checkpoints": records}, indent=2))
    elif not records:
        click.echo(f"{folder.name} has no checkpoint")
    else:
        _show(folder.name, records)
    if any(record["state"] == DAMAGED for record in records):
        sys.exit(1)


def _records(folder: RunFolder, *, verify: bool) -> list[dict[str, Any]]:
    """What is known of each checkpoint, oldest first, and of what was being written."""
    from dstrain.checkpoint.manifest import half_written, named_checkpoints, run_id
    from dstrain.plan.run_folder import read_metrics

    run = run_id(folder.run_id, folder.checkpoints)
    losses = {record["step"]: record.get("loss") for record in read_metrics(folder.metrics)}
    records = []
    for checkpoint in named_checkpoints(folder.checkpoints):
        record = _record(checkpoint, run, losses, verify=verify)
        if checkpoint.is_dir():  # one that a running training has removed meanwhile is no damaged one
            records.append(record)
    for aside in half_written(folder.checkpoints):
        step = aside.name.removeprefix(".step-").removesuffix(".partial")
        if step.isdigit():
            records.append(_unknown(aside) | {"step": int(step), "state": HALF_WRITTEN})
    return records


def _record(
    checkpoint: Path, run: str | None, losses: dict[int, float | None], *, verify: bool
) -> dict[str, Any]:
    from dstrain.checkpoint.manifest import damage_of, files_of, of_another_run, read_manifest, unknown_files

    step = int(checkpoint.name.removeprefix("step-"))
    record = _unknown(checkpoint) | {"step": step, "loss": losses.get(step), "state": COMPLETE}
    # Bytes that are read now count more than what was found in them before.
    why = damage_of(checkpoint, noted=not verify)
    if why is None and verify:
        why = _verify(checkpoint)
    try:
        manifest = read_manifest(checkpoint)
        why = why or of_another_run(checkpoint, run)
        record |= {
            "layout": _layout(manifest.get("identity", {})),
            "saved_at": manifest.get("saved_at", record["saved_at"]),
            "versions": manifest.get("versions", {}),
            "checksums": all(file.sha256 is not None for file in files_of(manifest).values()),
            "unknown_files": unknown_files(checkpoint),
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = why or f"its manifest can't be read ({error})"
    return record if why is None else record | {"state": DAMAGED, "why": why}


def _unknown(folder: Path) -> dict[str, Any]:
    """What can be said of any folder, with or without a manifest."""
    from dstrain.checkpoint.manifest import file_sizes

    try:
        size, saved_at = sum(file_sizes(folder).values()), folder.stat().st_mtime
    except OSError:
        size, saved_at = 0, None
    return {
        "step": None,
        "path": str(folder),
        "bytes": size,
        "layout": None,
        "loss": None,
        "saved_at": saved_at,
        "state": None,
        "why": None,
        "versions": {},
        "checksums": False,
        "unknown_files": [],
    }


def _verify(checkpoint: Path) -> str | None:
    """Read every byte, with a progress line on a terminal; leave a note of what was found, for `resume`."""
    from dstrain.checkpoint.integrity import wrong_files
    from dstrain.checkpoint.manifest import files_of, forget_damage, note_damage, read_manifest

    files = files_of(read_manifest(checkpoint))
    total = sum(file.size for file in files.values())
    with click.progressbar(length=total, label=f"reading {checkpoint.name}", width=0, file=sys.stderr) as bar:
        wrong = wrong_files(checkpoint, files, sorted(files), on_bytes=bar.update)
    why = "; ".join(wrong[name] for name in sorted(wrong)) or None
    try:
        if why is None:
            forget_damage(checkpoint)
        elif checkpoint.is_dir():
            note_damage(checkpoint, why)
    except OSError as error:
        click.echo(f"no note was left in {checkpoint}: {error.strerror}", err=True)
    return why


def _layout(identity: dict[str, Any]) -> str | None:
    """The layout by its name, as ``zero2-pp2-dp2``."""
    from dstrain.plan.layout_choice import LayoutChoice

    keys = ("zero", "pipeline", "data_parallel", "schedule", "offload")
    if any(key not in identity for key in keys):
        return None
    return LayoutChoice(**{key: identity[key] for key in keys}).name


def _show(name: str, records: list[dict[str, Any]]) -> None:
    from rich.box import HEAVY_HEAD
    from rich.text import Text

    from dstrain.cli.showing.tables import Column, FoldingTable, make_console
    from dstrain.plan.words import in_words

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
    for record in records:
        state = record["state"]
        told = f"{state}: {record['why']}" if record["why"] else state
        if state == COMPLETE and not record["checksums"]:
            told += " (of an earlier dstrain, without checksums: sizes only)"
        saved_at = record["saved_at"]
        table.add_row(
            str(record["step"]),
            in_words(record["bytes"]),
            record["layout"] or "-",
            f"{record['loss']:.4f}" if record["loss"] is not None else "-",
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(saved_at)) if saved_at else "-",
            Text(told, style=styles[state]),
        )
    console = make_console()
    console.print(Text(f"checkpoints of {name}", style="bold"))
    console.print(table)
    for record in records:
        if record["unknown_files"]:
            names = ", ".join(record["unknown_files"])
            console.print(
                f"step {record['step']} holds files that its manifest does not name, and that are ignored: {names}",
                soft_wrap=True,
            )
