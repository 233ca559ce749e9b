"""Checks that a folder's weights match its model, and of models that are not huge, that they are numbers.

``python -m dstrain.model.weights.check_weights CONFIG.json FOLDER OUT.json`` goes the way that loading goes, with
tensors that have a shape and no data, and writes what is worth knowing: ``unexpected`` (tensors that the model has
no place for), ``absent`` (buffers that keep their first value), ``bytes`` and ``tensors``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from dstrain.child_process import child_main
from dstrain.errors import DstrainError
from dstrain.files import write_json
from dstrain.model.architecture import load_config
from dstrain.model.quantization import quantized_modules
from dstrain.model.skeleton import empty_model
from dstrain.model.weights.pretrained import PretrainedWeights

CHECKED_BYTES = 4_000_000_000
"""Weights of up to so many bytes are read for values that are no numbers. Of more, the ranks find them when they load:
reading them here would take long."""


def check_weights(config_file: str | Path, folder: str | Path) -> dict[str, Any]:
    """See above.

    Raises:
        DstrainError: what loading would fail at: files missing, damaged or cut off, a tensor missing or of another
            shape, quantized weights that can't be trained, two values for one tied weight, a value that is no number.
    """
    weights = PretrainedWeights(folder)
    model = empty_model(load_config(config_file))
    loader = weights.loader(model, torch.float32, without_data=True)
    loader.check_ties()
    loader.quantized.check(quantized_modules(model))
    absent = loader.load(list(model.state_dict()))
    if weights.files.bytes <= CHECKED_BYTES:
        loader.check_numbers()
    tensors = weights.files.tensors.values()
    return {
        "unexpected": loader.unexpected,
        "absent": absent,
        "tensors": len(tensors),
        "bytes": weights.files.bytes,
    }


@child_main
def main(arguments: list[str]) -> int:
    """The command line; returns the exit code."""
    logging.set_verbosity_error()  # what it would warn of is an error here
    if len(arguments) != 3:
        raise DstrainError("usage: python -m dstrain.model.weights.check_weights CONFIG.json FOLDER OUT.json")
    config_file, folder, out = arguments
    write_json(Path(out), check_weights(config_file, folder))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
