"""Writes a checkpoint's tensors as a model folder's safetensors files: one precision, the family's names on disk."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import PretrainedConfig, PreTrainedModel

from dstrain.data.progress import Progress
from dstrain.engine.checkpoint_state import SavedState
from dstrain.errors import DstrainError
from dstrain.exporting.merging import MergedState
from dstrain.model.weights.on_disk import OnDisk
from dstrain.strict_json import to_json

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
            path.write_text(to_json(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise DstrainError(f"the weights can't be written: {error}", where=str(folder)) from error
    return list(split.filename_to_tensors)


class TensorsOfFiles:
    """Tensors on meta that stand for those in files.

    Attributes:
        files: name on disk -> tensor on meta.
    """

    files: dict[str, torch.Tensor]

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.files.values())

    @property
    def parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.files.values())


class ExportedTensors(TensorsOfFiles):
    """Reads, converts and rounds block by block: no more than one block is in memory.

    Args:
        state: of the checkpoint.
        config: of the model.
        dtype: of everything that is trained. What the model computed with is taken as it is where it has this
            precision already; else the fp32 weights, where there are any, are rounded to it.
        like: as for `OnDisk`.

    Attributes:
        files: name on disk -> tensor on meta, in the order in which ``parts`` gives them.

    Raises:
        DstrainError: the checkpoint is one of another model.
    """

    def __init__(
        self,
        state: SavedState | MergedState,
        config: PretrainedConfig,
        dtype: torch.dtype,
        like: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self.dtype = dtype
        self._state = state
        self._model = OnDisk(config, dtype, like)
        self.files = self._model.files
        self.architecture = type(self._model.model).__name__
        for name, want in self._model.tensors.items():
            found = state.parameters.get(name)
            if want.is_meta and (found is None or found.weight.shape != tuple(want.shape)):
                have = f"it has the shape {list(found.weight.shape)}" if found else "it is missing"
                raise DstrainError(
                    f"the model has {name} of shape {list(want.shape)}, and in the checkpoint {have}",
                    where=str(state.folder.parent),
                    hint="it was saved for another model: restore the model's own config.json, or a whole checkpoint",
                )

    @property
    def padding_moves_positions(self) -> bool:
        """Whether the family counts positions from the padding token's id on, as roberta does."""
        model = self._model.model
        return any(
            getattr(module, "padding_idx", None) is not None
            for module in model.modules()
            if not isinstance(module, PreTrainedModel) and module is not model.get_input_embeddings()
        )

    def parts(self) -> Iterator[dict[str, torch.Tensor]]:
        """Name on disk -> tensor, a block at a time."""
        for names in self._model.parts:
            yield self._model.convert({name: self.value(name) for name in names})

    def names(self) -> list[str]:
        """The names in memory of what is written."""
        return list(self._model.tensors)

    def value(self, name: str) -> torch.Tensor:
        """One tensor by its name in memory, in the precision in which it is written.

        Raises:
            DstrainError: a weight is too large for fp16.
        """
        wanted = self._model.tensors[name]
        if name not in self._state.parameters:
            # A buffer: the checkpoint's, or of a module without weights, whose value the constructor set.
            saved = self._state.buffers.get(name)
            return saved.read() if saved else wanted
        parameter = self._state.parameters[name]
        exact = parameter.weight.dtype == wanted.dtype
        value = (parameter.weight if exact else parameter.most_precise).read()
        return value if exact else rounded(name, value, wanted.dtype)


def rounded(name: str, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``value`` in the precision in which it is written. Raises DstrainError where it is too large for fp16."""
    found = value.to(dtype)
    if dtype == torch.float16 and (found.isinf() & value.isfinite()).any():
        raise DstrainError(
            f"{name} contains the value {value.abs().max():.3g}, and the largest fp16 value is 65504",
            where="--dtype",
            hint="--dtype bf16",
        )
    return found
