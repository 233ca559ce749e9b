"""``dstrain generate OUT "prompt"``: generates text with the model in a folder."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from dstrain.cli.once_options import OnceOptions


@click.command("generate", cls=OnceOptions)
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("prompt")
@click.option(
    "--tokens", type=click.IntRange(1), default=120, show_default=True, help="Maximum number of tokens."
)
@click.option(
    "--temperature",
    type=click.FloatRange(0),
    default=0.7,
    show_default=True,
    help="Sampling temperature. 0: always take the most likely token.",
)
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Random seed of the sampling."
)
@click.option(
    "--chat",
    is_flag=True,
    help="PROMPT is what a user says: use the model's chat template, and print the answer.",
)
@click.option("--system", default="", metavar="TEXT", help="With --chat: a system message.")
def command(
    folder: Path, prompt: str, tokens: int, temperature: float, seed: int, chat: bool, system: str
) -> None:
    """Continue PROMPT with the model in FOLDER (from `dstrain export`, or any Hugging Face model).

    On a terminal, control characters in the text are shown as escapes (\\x1b); into a file or a pipe it goes as it is.
    """
    from dstrain.api.exporting import generate
    from dstrain.cli.showing.progress import PROGRESS
    from dstrain.formatting import plain

    text = generate(
        folder,
        prompt,
        tokens=tokens,
        temperature=temperature,
        seed=seed,
        chat=chat,
        system=system,
        events=PROGRESS,
    )
    click.echo(plain(text) if sys.stdout.isatty() else text, color=True)
