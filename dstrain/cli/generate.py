"""``dstrain generate OUT "prompt"``: a quick look at what a model folder says."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import click

from dstrain.errors import DstrainError


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
    from dstrain.api.child_process import run_module

    if not (folder / "config.json").is_file():
        raise DstrainError(
            f"{folder} is no model folder (it has no config.json)",
            where="FOLDER",
            hint="`dstrain export RUN FOLDER` makes one from a run",
        )
    with tempfile.TemporaryDirectory() as aside:
        request = Path(aside) / "request.json"
        choices = {"prompt": prompt, "tokens": tokens, "temperature": temperature, "seed": seed}
        request.write_text(json.dumps({"folder": str(folder)} | choices), encoding="utf-8")
        run_module("dstrain.exporting.generate", str(request), speaks=True)
