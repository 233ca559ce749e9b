"""``dstrain generate OUT "prompt"``: a quick look at what a model folder writes."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("generate")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("prompt")
@click.option("--tokens", type=click.IntRange(1), default=120, show_default=True, help="At most so many.")
@click.option(
    "--temperature",
    type=click.FloatRange(0),
    default=0.7,
    show_default=True,
    help="0 takes the likeliest token each time.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the sampling.")
def command(folder: Path, prompt: str, tokens: int, temperature: float, seed: int) -> None:
    """Let the model in FOLDER (of `dstrain export`, or any Hugging Face model's) continue PROMPT."""
    from dstrain.api.exporting import generate
    from dstrain.cli.showing.progress import PROGRESS

    click.echo(generate(folder, prompt, tokens=tokens, temperature=temperature, seed=seed, events=PROGRESS))
