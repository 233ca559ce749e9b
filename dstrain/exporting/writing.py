"""Writes safetensors files and their index, a few gigabytes at a time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file

from dstrain.data.progress import Progress
from dstrain.errors import DstrainError
from dstrain.exporting.tensors import ExportedTensors

LARGEST_FILE = 2_000_000_000
"""Bytes. A file is collected in memory before it is written; one larger tensor gets a file of its own."""

# Configuration, tokenizer and headers beside the weights, bytes.
_ROOM = 64_000_000


def refuse_full_disk(folder: Path, needed: int) -> None:
    """Raises DstrainError where ``needed`` bytes of weights do not fit on the disk of ``folder``."""
    free = shutil.disk_usage(folder).free
    if free < needed + _ROOM:
        raise DstrainError(
            f"the model needs {needed / 1e9:,.1f} GB, but only {free / 1e9:,.1f} GB are free on this disk",
            where=str(folder),
            hint="choose OUT on another disk, or --dtype bf16",
        )


def write_weights(tensors: ExportedTensors, folder: Path) -> list[str]:
    """Write all files; returns their names.

    Raises:
        DstrainError: the disk does not take them.
    """
    split = split_torch_state_dict_into_shards(
        tensors.files, filename_pattern="model{suffix}.safetensors", max_shard_size=LARGEST_FILE
    )
    waiting: dict[str, dict[str, torch.Tensor]] = {file: {} for file in split.filename_to_tensors}
    progress = Progress("writing the model", tensors.bytes, "bytes")
    done = 0
    try:
        for part in tensors.parts():
            for name, tensor in part.items():
                file = split.tensor_to_filename[name]
                # Not a view of a mapped checkpoint, nor of what the conversion has cut in pieces.
                waiting[file][name] = tensor.clone(memory_format=torch.contiguous_format)
                done += tensor.nbytes
            for file in [f for f in waiting if len(waiting[f]) == len(split.filename_to_tensors[f])]:
                save_file(waiting.pop(file), folder / file, metadata={"format": "pt"})
                (folder / file).chmod(0o644)  # the library leaves it to its owner alone
            progress.update(done)
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            path = folder / "model.safetensors.index.json"
            path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise DstrainError(f"the weights can't be written: {error}", where=str(folder)) from error
    return list(split.filename_to_tensors)
