"""Checks that an exported folder contains the trained model: files, names and validation loss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from dstrain.data.progress import Progress
from dstrain.data.rows.packing import Rows
from dstrain.data.tokenizing.tokenizers import Tokenizer, load_tokenizer
from dstrain.errors import DstrainError
from dstrain.exporting.writing import ExportedTensors
from dstrain.model.architecture import load_config
from dstrain.model.document_masks import Documents
from dstrain.model.pipeline_split.structure import takes_positions
from dstrain.model.quantization import keep_packing, no_fetched_kernels
from dstrain.model.weights.on_disk import refused_keys

_TEXT = "def f(x):\n\treturn 'é 中 🙂'  # \x00 and 12.5 %"


def check_files(folder: Path, files: list[str], tensors: ExportedTensors) -> None:
    """Compare every tensor on disk with the checkpoint's, to the bit, and the names with the model's.

    The checkpoint is read and converted a second time.

    Raises:
        DstrainError: they differ. Exit code 1.
    """
    place, found = {}, {}
    for file in files:
        with safe_open(folder / file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - no mapping
                place[name] = file
                found[name] = torch.empty(opened.get_slice(name).get_shape(), device="meta")
    if place.keys() != tensors.files.keys():
        odd = sorted(place.keys() ^ tensors.files.keys())
        raise _wrong(f"the files contain other tensors than the model: {odd[0]}", folder)
    progress = Progress("comparing it with the checkpoint", tensors.bytes, "bytes")
    done = 0
    for part in tensors.parts():
        for file in dict.fromkeys(place[name] for name in part):
            # One file at a time, so that no more of them stay mapped.
            with safe_open(folder / file, framework="pt") as opened:
                for name in (name for name in part if place[name] == file):
                    if not _same_bits(opened.get_tensor(name), part[name]):
                        raise _wrong(f"{name} differs from the checkpoint", folder / file)
                    done += part[name].nbytes
        progress.update(done)
    config = load_config(folder)
    if getattr(config, "quantization_config", None):
        raise _wrong("its config.json has a quantization_config, but the weights are not quantized", folder)
    if wrong := refused_keys(config, found):
        raise _wrong(f"from_pretrained would not find the model in these files: {wrong[0]}", folder)


def check_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Raises DstrainError (exit code 1) if the folder's tokenizer does not give the ids that were trained on."""
    exported = load_tokenizer(str(folder))
    if not np.array_equal(exported.encode(_TEXT), tokenizer.encode(_TEXT)):
        raise _wrong("the exported tokenizer produces other ids than the one used in training", folder)


def load_exported(folder: Path, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """The model as a user loads it. Raises DstrainError (exit code 1) if weights were left out."""
    loaded = _from_pretrained(folder, dtype, attention, output_loading_info=True)
    model: PreTrainedModel
    model, told = loaded
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if told.get(what):
            raise _wrong(f"from_pretrained reports {what}: {sorted(map(str, told[what]))[0]}", folder)
    model.eval()
    return model


def load_base(
    folder: str | Path,
    dtype: torch.dtype,
    attention: str,
    quantization: BitsAndBytesConfig | None = None,
) -> PreTrainedModel:
    """The model that an adapter is for, as a user loads it.

    Args:
        quantization: what it is to be quantized to.
    """
    options = {} if quantization is None else {"quantization_config": quantization, "device_map": {"": "cpu"}}
    with no_fetched_kernels():
        model: PreTrainedModel = _from_pretrained(folder, dtype, attention, **options).eval()
    keep_packing(model)
    return model


def _from_pretrained(folder: str | Path, dtype: torch.dtype, attention: str, **options: Any) -> Any:
    if attention != "auto":
        options["attn_implementation"] = attention
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, local_files_only=True, trust_remote_code=False, **options
    )


def check_loaded(model: PreTrainedModel, tensors: ExportedTensors) -> None:
    """Compare the loaded model's parameters with the checkpoint's, unconverted. Raises DstrainError."""
    written = set(tensors.names())
    for name, parameter in model.named_parameters():
        if name in written and not _same_bits(parameter.detach(), tensors.value(name).to(parameter.dtype)):
            raise _wrong(
                f"{name} loads with other values than the checkpoint's", Path(model.name_or_path or "")
            )


@torch.no_grad()
def validation_loss(model: PreTrainedModel, sets: Sequence[Rows], samples: int) -> float:
    """Mean cross-entropy over the label tokens of the first ``samples`` rows of each set, as during the training."""
    with_positions, documents = takes_positions(model), Documents(model)
    total, count = 0.0, 0
    numbers = [(rows, row) for rows in sets for row in range(min(samples, len(rows)))]
    progress = Progress("validation loss of the exported model", len(numbers), "samples")
    for done, (rows, row) in enumerate(numbers, start=1):
        batch = rows.rows(np.array([row]))
        input_ids, position_ids, labels = (torch.from_numpy(np.ascontiguousarray(part)) for part in batch)
        positions = {"position_ids": position_ids} if with_positions else {}
        with documents.apart(position_ids) as lengths:
            logits = model(input_ids=input_ids, use_cache=False, **positions, **lengths).logits
        total += float(cross_entropy(logits[0].float(), labels[0], ignore_index=-100, reduction="sum"))
        count += int((labels != -100).sum())
        progress.update(done)
    return total / max(1, count)


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal in shape, type and every bit: nan is equal to itself, and 0 is not -0."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    flat = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return torch.equal(*flat)


def _wrong(message: str, where: Path) -> DstrainError:
    return DstrainError(message, where=str(where), exit_code=1)
