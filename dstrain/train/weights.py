"""Writes the final weights as safetensors: one file per stage, Hugging Face names, fp32."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file
from torch import distributed

from dstrain.engine.interface import Engine


def save_weights(engine: Engine, folder: Path, stage: int, replica: int) -> None:
    """Write ``stage-N.safetensors``; the first replica of each stage does. Collective."""
    tensors = dict(engine.weights())
    if replica == 0:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / f"stage-{stage}.safetensors")
    distributed.barrier()
