"""``dstrain export RUN OUT``: a run's checkpoint as a Hugging Face folder, checked."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dstrain.errors import DstrainError

if TYPE_CHECKING:
    from dstrain.runs.run_folder import RunFolder


@click.command("export")
@click.argument("run")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--step", type=click.IntRange(1), help="Of which checkpoint. Default: the newest.")
@click.option(
    "--dtype", type=click.Choice(["fp32", "bf16", "fp16"]), help="Default: the precision that was trained in."
)
@click.option(
    "--no-loss",
    is_flag=True,
    help="Do not load the exported model for its validation loss: it may not fit here.",
)
def command(run: str, out: Path, step: int | None, dtype: str | None, no_loss: bool) -> None:
    """Write the model of RUN (a run folder, or its name below runs/) to the folder OUT.

    AutoModelForCausalLM.from_pretrained(OUT) loads it, tokenizer and generation config included. Works
    for every layout but offload: nvme, without GPUs, and a block at a time. Every tensor is read back and
    compared; then the exported model's validation loss stands next to the run's own.
    """
    from dstrain.api.child_process import run_module
    from dstrain.cli.resume import find_run

    folder = find_run(run)
    checkpoint = _checkpoint(folder, step)
    _refuse_occupied(out)
    with tempfile.TemporaryDirectory() as aside:
        request, answer = Path(aside) / "request.json", Path(aside) / "answer.json"
        request.write_text(
            json.dumps(
                {
                    "run": str(folder.path),
                    "checkpoint": str(checkpoint),
                    "out": str(out.absolute()),
                    "dtype": dtype,
                    "with_loss": not no_loss,
                }
            ),
            encoding="utf-8",
        )
        run_module("dstrain.exporting.convert", str(request), str(answer))
        _tell(out, json.loads(answer.read_text(encoding="utf-8")), with_loss=not no_loss)


def _checkpoint(folder: RunFolder, step: int | None) -> Path:
    """The newest complete checkpoint, or that of ``step``. Raises DstrainError."""
    from dstrain.runs.checkpoint.manifest import complete_checkpoints, read_manifest

    found = {int(read_manifest(path)["step"]): path for path in complete_checkpoints(folder.checkpoints)}
    if not found:
        raise DstrainError(
            f"{folder.name} has no complete checkpoint",
            where=str(folder.checkpoints),
            hint=f"`dstrain resume {folder.name}` trains it to its end, where it saves one",
        )
    if step is not None and step not in found:
        raise DstrainError(
            f"{folder.name} has no checkpoint of step {step}",
            where="--step",
            hint=f"there are: {', '.join(map(str, found))}; keep: N keeps more",
        )
    return found[step or max(found)]


def _refuse_occupied(out: Path) -> None:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        what = "is not empty" if out.is_dir() else "is a file"
        raise DstrainError(f"{out} {what}", where="OUT", hint="name a folder that is not there yet")
    above = next((folder for folder in out.absolute().parents if folder.exists()), None)
    if above is not None and not above.is_dir():
        raise DstrainError(
            f"{out} can't be made: {above} is a file", where="OUT", hint="name a folder that is not there yet"
        )


def _tell(out: Path, answer: dict[str, Any], *, with_loss: bool) -> None:
    size = f"{answer['parameters']:,} parameters, {answer['bytes'] / 1e6:,.1f} MB of {answer['dtype']}"
    files = f"{answer['files']} file{'s' if answer['files'] > 1 else ''}"
    click.echo(f"exported   step {answer['step']} to {out}: {size} in {files}")
    click.echo(
        f"checked    all {answer['tensors']} tensors equal the checkpoint's, and from_pretrained finds each"
    )
    if answer["loss"] is not None:
        click.echo(f"validation {answer['loss']:.6f}  the exported model's loss")
    elif answer["no_loss_because"] is not None:
        click.echo(f"validation loss: not taken: {answer['no_loss_because']}")
    elif with_loss:
        click.echo("validation this run has no validation set, so there is no loss to compare")
    if answer["run_loss"] is not None:
        at = "the run's own" if answer["run_loss_step"] == answer["step"] else "the run's last before that"
        click.echo(f"           {answer['run_loss']:.6f}  {at}, at step {answer['run_loss_step']}")
    click.echo(f'look at it: dstrain generate {out} "..."')
