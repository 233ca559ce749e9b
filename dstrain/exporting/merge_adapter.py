"""``python -m dstrain.exporting.merge_adapter REQUEST.json ANSWER.json``: a base model and an adapter become one model.

The adapter may be PEFT's own or of `dstrain export`. A layer and a file of the model are in memory at a time.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.utils import GENERATION_CONFIG_NAME, logging

from dstrain.child_process import child_main
from dstrain.data.tokenizing.tokenizer_files import CHAT_TEMPLATE_FILES, TOKENIZER_FILES, VOCABULARY_FILES
from dstrain.engine.interface import DTYPES
from dstrain.exporting.checking import check_files
from dstrain.exporting.folder import describe, own_generation_config, writing, written_aside
from dstrain.exporting.merging import MergedState, model_maker, unquantized, untied, unties
from dstrain.exporting.writing import ExportedTensors, write_weights
from dstrain.files import write_json
from dstrain.model.adapter_file import AdapterFile
from dstrain.model.adapters import Adapters
from dstrain.model.architecture import load_config
from dstrain.model.pipeline_split.probe import why_not_pipelined
from dstrain.model.weights.pretrained import PretrainedWeights


def merge(adapter: Path, base: Path, out: Path, *, aside: Path, dtype: str | None = None) -> dict[str, Any]:
    """Write ``out``, which appears whole and checked, or not at all.

    Args:
        adapter: its folder.
        base: the folder of the model that it is for.
        aside: where it is written before it has its name.
        dtype: ``fp32``, ``bf16`` or ``fp16``; None: that of the base model's weights.

    Returns:
        ``dtype``, ``files``, ``tensors``, ``parameters`` and ``bytes``.

    Raises:
        DstrainError: the adapter is of another model or no adapter, a file is damaged, or the disk is full.
    """
    config = load_config(base)
    adapters = Adapters(config, adapter, unpacked=torch.float32)
    file = AdapterFile(adapter)
    file.refuse_others(adapters.trained)
    weights = PretrainedWeights(base)
    make = model_maker(config, adapters, weights, seed=0, splits=why_not_pipelined(config) is None)
    written = unquantized(untied(config) if unties(config, adapters) else config)
    dtype = dtype or _dtype_of(config)
    stored = {
        name: torch.empty(tensor.shape, device="meta") for name, tensor in weights.files.tensors.items()
    }
    like = None if adapters.bits else stored  # packed weights are not written so
    tensors = ExportedTensors(MergedState(make, file.read, adapter), written, DTYPES[dtype], like=like)
    with written_aside(out, aside, tensors.bytes):
        with writing(out):
            describe(written, tensors)
            written.save_pretrained(aside)
            _copy_descriptions(adapter, base, aside)
        files = write_weights(tensors, aside)
        check_files(aside, files, tensors)
    return {
        "dtype": dtype,
        "files": len(files),
        "tensors": len(tensors.files),
        "parameters": tensors.parameters,
        "bytes": tensors.bytes,
    }


def _dtype_of(config: PretrainedConfig) -> str:
    dtype = getattr(config, "dtype", None)
    return next((name for name, known in DTYPES.items() if known == dtype), "fp32")


def _copy_descriptions(adapter: Path, base: Path, out: Path) -> None:
    """The tokenizer that lies with the adapter, else the base model's, and how that generates."""
    own = any((adapter / name).is_file() for name in VOCABULARY_FILES)
    for name in (*TOKENIZER_FILES, *CHAT_TEMPLATE_FILES):
        source = (adapter if own else base) / name
        if source.is_file():
            shutil.copyfile(source, out / name)
    generation = own_generation_config(base / GENERATION_CONFIG_NAME)
    if generation is not None:
        write_json(out / GENERATION_CONFIG_NAME, generation)


@child_main
def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    if len(argv) != 2:
        print("usage: python -m dstrain.exporting.merge_adapter REQUEST.json ANSWER.json", file=sys.stderr)
        return 2
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    request = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
    paths = {name: Path(request[name]) for name in ("adapter", "base", "out", "aside")}
    write_json(Path(argv[1]), merge(**paths, dtype=request["dtype"]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
