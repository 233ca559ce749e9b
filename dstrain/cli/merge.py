"""``dstrain merge ADAPTER OUT``: writes a model with an adapter merged into its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dstrain.cli.once_options import OnceOptions


@click.command("merge", cls=OnceOptions)
@click.argument("adapter", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--base",
    metavar="MODEL",
    help="Model that the adapter is for. Default: the one that its configuration names.",
)
@click.option(
    "--dtype",
    type=click.Choice(["fp32", "bf16", "fp16"]),
    help="Data type of the weights. Default: that of the base model.",
)
def command(adapter: Path, out: Path, base: str | None, dtype: Any) -> None:
    """Write the model of ADAPTER, a folder of PEFT or of `dstrain export`, with the adapter in it to the folder OUT.

    AutoModelForCausalLM.from_pretrained(OUT) loads it, without PEFT. Works without GPUs, a block at a time.
    """
    from dstrain.api.exporting import merge
    from dstrain.cli.showing.progress import PROGRESS

    made = merge(adapter, out, base=base, dtype=dtype, events=PROGRESS)
    size = f"{made.parameters:,} parameters, {made.bytes / 1e6:,.1f} MB of {made.dtype}"
    click.echo(f"merged     {adapter} into {made.base}")
    click.echo(f"written    {made.folder}: {size} in {made.files} file{'s' if made.files > 1 else ''}")
    click.echo(f"checked    all {made.tensors} tensors were read back and are equal to what was computed")
    click.echo(f'try it:    dstrain generate {made.folder} "..."')
