"""An adapter in a folder as PEFT writes it: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from dstrain.engine.checkpoint_state import SavedState
from dstrain.errors import DstrainError
from dstrain.exporting.writing import TensorsOfFiles, rounded
from dstrain.lora import ADAPTER_WEIGHTS, is_adapter_parameter, saved_name
from dstrain.model.adapters import Adapters, import_peft


class ExportedAdapter(TensorsOfFiles):
    """An adapter's tensors in a checkpoint, in one precision.

    Attributes:
        files: name in the file -> tensor on meta.

    Raises:
        DstrainError: the checkpoint holds no adapter.
    """

    def __init__(self, state: SavedState, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._saved = {
            saved_name(name): parameter
            for name, parameter in state.parameters.items()
            if is_adapter_parameter(name)
        }
        if not self._saved:
            raise DstrainError("this checkpoint holds no adapter", where=str(state.folder.parent))
        self.files = {
            name: torch.empty(parameter.weight.shape, dtype=dtype, device="meta")
            for name, parameter in self._saved.items()
        }

    def value(self, name: str) -> torch.Tensor:
        """By its name in the file. Raises DstrainError where it is too large for fp16."""
        saved = self._saved[name]
        if saved.weight.dtype == self.dtype:
            return saved.weight.read()
        return rounded(name, saved.most_precise.read(), self.dtype)


def write_adapter(exported: ExportedAdapter, adapters: Adapters, base: str, folder: Path) -> str:
    """Write both files; returns the name of that with the weights.

    Args:
        base: the model that it was trained for, as ``from_pretrained`` takes it.

    Raises:
        DstrainError: the disk does not take them.
    """
    tensors = {name: exported.value(name).clone() for name in exported.files}
    try:
        save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        (folder / ADAPTER_WEIGHTS).chmod(0o644)  # the library leaves it to its owner alone
        adapters.config_to_save(base).save_pretrained(str(folder))
    except (OSError, SafetensorError) as error:
        raise DstrainError(f"the adapter can't be written: {error}", where=str(folder)) from error
    return ADAPTER_WEIGHTS


def check_adapter(folder: Path, exported: ExportedAdapter) -> None:
    """Compare every tensor on disk with the checkpoint's. Raises DstrainError (exit code 1)."""
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as opened:
        if set(opened.keys()) != exported.files.keys():
            raise _wrong("the file contains other tensors than the adapter", folder)
        for name in exported.files:
            if not torch.equal(opened.get_tensor(name), exported.value(name)):
                raise _wrong(f"{name} differs from the checkpoint", folder)


def load_with_peft(model: PreTrainedModel, folder: Path, exported: ExportedAdapter) -> torch.nn.Module:
    """The model with its adapter, as a user of PEFT loads it. Raises DstrainError where weights were left out."""
    adapted = load_adapter(model, folder)
    loaded = {
        saved_name(name.removeprefix("base_model.model.")): parameter
        for name, parameter in adapted.named_parameters()
        if is_adapter_parameter(name)
    }
    if odd := sorted(loaded.keys() ^ exported.files.keys()):
        raise _wrong(f"PEFT does not load {odd[0]}", folder)
    for name, parameter in loaded.items():
        if not torch.equal(parameter.detach(), exported.value(name).to(parameter.dtype)):
            raise _wrong(f"PEFT loads {name} with other values than the checkpoint's", folder)
    return adapted.eval()


def load_adapter(model: PreTrainedModel, folder: Path) -> torch.nn.Module:
    """The model with its adapter, in the precision of the files. The model itself is changed."""
    adapted: torch.nn.Module = import_peft().PeftModel.from_pretrained(
        model, str(folder), autocast_adapter_dtype=False, local_files_only=True
    )
    return adapted


def _wrong(message: str, where: Path) -> DstrainError:
    return DstrainError(message, where=str(where), exit_code=1)
