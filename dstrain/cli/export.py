"""``dstrain export RUN OUT``: writes a checkpoint as a Hugging Face folder, and checks it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dstrain.cli.once_options import OnceOptions
from dstrain.cli.options import trust_option

if TYPE_CHECKING:
    from dstrain.api.exporting import ExportResult


@click.command("export", cls=OnceOptions)
@click.argument("run")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--step", type=click.IntRange(1), help="Step of the checkpoint to export. Default: the newest.")
@click.option(
    "--dtype",
    type=click.Choice(["fp32", "bf16", "fp16"]),
    help="Data type of the weights. Default: the precision of the run.",
)
@click.option(
    "--no-loss",
    is_flag=True,
    help="Do not compute the validation loss, for which the exported model must fit into memory.",
)
@click.option("--merge", is_flag=True, help="Write the model with the run's adapter merged into its weights.")
@trust_option
def command(
    run: str, out: Path, step: int | None, dtype: Any, no_loss: bool, merge: bool, trust: bool
) -> None:
    """Write the model of RUN (a run folder, or its name in runs/) to the folder OUT.

    AutoModelForCausalLM.from_pretrained(OUT) loads it, tokenizer and generation config included. Works
    for every layout but offload: nvme, without GPUs, and a block at a time. Every tensor is read back and
    compared; then the exported model's validation loss stands next to the run's own.

    Of a run that trains an adapter OUT is the adapter as PEFT writes it, for PeftModel.from_pretrained; with
    --merge it is the whole model.
    """
    from dstrain.api.exporting import export
    from dstrain.cli.showing.progress import PROGRESS

    made = export(
        run,
        out,
        step=step,
        dtype=dtype,
        with_loss=not no_loss,
        merge=merge,
        trust=trust,
        events=PROGRESS,
    )
    _show(made, not no_loss)


def _show(result: ExportResult, with_loss: bool) -> None:
    size = f"{result.parameters:,} parameters, {result.bytes / 1e6:,.1f} MB of {result.dtype}"
    files = f"{result.files} file{'s' if result.files > 1 else ''}"
    click.echo(f"exported   step {result.step} to {result.folder}: {size} in {files}")
    loads = "from_pretrained" if result.adapter_for is None else "PeftModel.from_pretrained"
    click.echo(
        f"checked    all {result.tensors} tensors equal the checkpoint's, and {loads} loads each of them"
    )
    if result.loss is not None:
        click.echo(f"validation {result.loss:.6f}  the exported model's loss")
    elif result.no_loss_because is not None:
        click.echo(f"validation loss: not computed: {result.no_loss_because}")
    elif with_loss:
        click.echo("validation this run has no validation set, so there is no loss to compare")
    if result.run_loss is not None:
        at = "the run's own" if result.run_loss_step == result.step else "the run's last one before that"
        click.echo(f"           {result.run_loss:.6f}  {at}, at step {result.run_loss_step}")
    if result.adapter_for is not None:
        click.echo(f"adapter    for {result.adapter_for}")
    click.echo(f'try it:    dstrain generate {result.folder} "..."')
