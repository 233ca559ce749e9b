"""Loads pretrained weights into a weightless model, part by part.

Renamed keys, fused experts and split matrices are transformers' business: its own loader is called, with tensors that
are read only when it asks for them. These names are private to transformers, and stand here and in ``on_disk.py``.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging
from transformers.utils.loading_report import LoadStateDictInfo

from dstrain.errors import DstrainError
from dstrain.model.quantization import bits_on_disk
from dstrain.model.weights.quantized_weights import QuantizedWeights
from dstrain.model.weights.weight_files import StoredTensor, WeightFiles

_TEXT_PART = {
    r"^language_model\.model\.": "model.",
    r"^language_model\.lm_head\.": "lm_head.",
    r"^model\.language_model\.": "model.",
}


class PretrainedWeights:
    """The weights that lie in a model folder. Opening it reads headers only.

    Raises:
        DstrainError: as ``WeightFiles`` does.
    """

    def __init__(self, folder: str | Path) -> None:
        self.files = WeightFiles(folder)

    def loader(
        self, model: PreTrainedModel, dtype: torch.dtype, *, without_data: bool = False
    ) -> WeightLoader:
        """For ``model``, whose parameters are on meta."""
        return WeightLoader(self.files, model, dtype, without_data=without_data)


class WeightLoader:
    """Loads parts of a folder's weights into one model, which is whole: no stand-ins while it works.

    All parameters get the type of the training, those too that a family would keep in fp32 (routers, state-space
    decays): DeepSpeed's 16-bit modes know parameters of one type only, and keep an fp32 copy of each for the
    optimizer. Buffers keep the type that the family gave them (a router's correction stays fp32).

    Attributes:
        unexpected: tensors of the files that the model has no place for.
        quantized: weights that are not loaded, but taken as they are.

    Raises:
        DstrainError: the weights are quantized otherwise than by bitsandbytes.
    """

    def __init__(
        self, files: WeightFiles, model: PreTrainedModel, dtype: torch.dtype, *, without_data: bool
    ) -> None:
        bits_on_disk(model.config, str(files.folder))
        self._files = files
        self._model = model
        self._dtype = dtype
        self._device = "meta" if without_data else "cpu"
        self._conversions = get_model_conversion_mapping(model, self._key_mapping())
        self._sources, self.unexpected = self._assign()
        self.quantized = QuantizedWeights(
            files, {key: name for name, keys in self._sources.items() for key in keys}
        )
        self.unexpected = [key for key in self.unexpected if key not in self.quantized.keys]

    def load(self, names: Collection[str]) -> list[str]:
        """Give the parameters and buffers of these Hugging Face names their values, and memory of their own.

        Quantized weights are passed over. What is one parameter before is one afterwards; it is read once.

        Returns:
            Buffers that the files do not hold; they keep their first value.

        Raises:
            DstrainError: a tensor is missing or of another shape, or can't be read.
        """
        names = [name for name in names if name not in self.quantized.names]
        aliases = self._aliases(names)
        wanted = {name: _held(self._model, name) for name in names if name not in aliases}
        for tensor in wanted.values():
            if isinstance(tensor, nn.Parameter) and tensor.dtype == torch.float32:
                tensor.data = tensor.data.to(self._dtype)
        trained = {name: tensor.requires_grad for name, tensor in wanted.items()}
        absent = self._check(self._convert(wanted))
        for name in wanted:
            tensor = _held(self._model, name)
            tensor.__dict__.pop("_is_hf_initialized", None)
            if isinstance(tensor, nn.Parameter):
                tensor.requires_grad_(trained[name])
            if not tensor.is_meta and tensor.untyped_storage().nbytes() != tensor.nbytes:
                tensor.data = tensor.data.contiguous().clone()  # a part of a split matrix
            elif not tensor.is_contiguous():
                tensor.data = tensor.data.contiguous()
        for alias, name in aliases.items():
            parent, _, last = alias.rpartition(".")
            tied = _held(self._model, name)
            assert isinstance(tied, nn.Parameter)
            self._model.get_submodule(parent)._parameters[last] = tied
        return absent

    def take(self, names: Collection[str]) -> nn.Parameter:
        """The one weight that has all these names, loaded, and left on meta in the model."""
        before = {name: _held(self._model, name) for name in names}
        name = next((n for n in names if n in self._sources), next(iter(names)))
        self.load([name])
        loaded = _held(self._model, name)
        for name, empty in before.items():
            parent, _, last = name.rpartition(".")
            assert isinstance(empty, nn.Parameter)
            self._model.get_submodule(parent)._parameters[last] = empty
        assert isinstance(loaded, nn.Parameter)
        return loaded

    def check_ties(self) -> None:
        """Refuse a folder that holds two values for what its config calls one weight. Reads those tensors.

        Raises:
            DstrainError: with both names.
        """
        groups: dict[int, list[str]] = {}
        for name, parameter in self._model.named_parameters(remove_duplicate=False):
            if name in self._sources:
                groups.setdefault(id(parameter), []).append(name)
        for first, *others in groups.values():
            for other in others:
                one, two = (self._stored(name) for name in (first, other))
                if one and two and not one.same_as(two):
                    raise DstrainError(
                        f"{first} and {other} are tied by the config, but differ in the weight files",
                        where=str(self._files.folder),
                        hint="set tie_word_embeddings: false in config.json if they are meant to differ",
                    )

    def check_numbers(self) -> None:
        """Refuse parameters with values that are no finite numbers. Reads all of them, piece by piece.

        Raises:
            DstrainError: with the tensor.
        """
        state = self._model.state_dict(keep_vars=True)
        for name, keys in self._sources.items():
            for key in keys if isinstance(state[name], nn.Parameter) else ():
                stored = self._files.tensors[key]
                if (what := stored.no_number()) is not None:
                    raise _no_number(key, what, stored)

    def _key_mapping(self) -> dict[str, str] | None:
        """Of a multimodal model's files the text part is loaded: its names have one more part in front."""
        own = any("language_model." in name for name in self._model.state_dict())
        return None if own else dict(_TEXT_PART)

    def _stored(self, name: str) -> StoredTensor | None:
        keys = self._sources[name]
        return self._files.tensors[keys[0]] if len(keys) == 1 else None

    def _assign(self) -> tuple[dict[str, list[str]], list[str]]:
        """Which tensors of the files each name of the model is made of, and those that are for none.

        As transformers' loader does in its first step; of a matrix that is split, all belong to the first part.
        """
        renamings = [entry for entry in self._conversions if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._conversions if isinstance(entry, WeightConverter)]
        state, prefix = self._model.state_dict(), self._model.base_model_prefix
        sources: dict[str, list[str]] = {}
        info = _empty_info()
        for key in self._files.tensors:
            name, _ = rename_source_key(key, renamings, converters, prefix, state)
            if name not in state and key in state:
                name, _ = rename_source_key(key, [], [], prefix, state)
            if name in state:
                sources.setdefault(name, []).append(key)
            else:
                info.unexpected_keys.add(key)
        self._model._adjust_missing_and_unexpected_keys(
            info
        )  # takes out what the family knows to be superfluous
        return sources, sorted(info.unexpected_keys)

    def _aliases(self, names: Collection[str]) -> dict[str, str]:
        """Names of parameters that have another of ``names``, and which one: the one to be loaded."""
        uses: dict[int, list[str]] = {}
        for name in names:
            tensor = _held(self._model, name)
            if isinstance(tensor, nn.Parameter):
                uses.setdefault(id(tensor), []).append(name)
        canonical = set(getattr(self._model, "all_tied_weights_keys", {}).values())
        aliases: dict[str, str] = {}
        for group in uses.values():
            chosen = min(group, key=lambda name: (name not in self._sources, name not in canonical))
            aliases |= {name: chosen for name in group if name != chosen}
        return aliases

    def _convert(self, wanted: Mapping[str, torch.Tensor]) -> LoadStateDictInfo:
        """Let transformers load what ``wanted`` is made of. Nothing else is given to it, so nothing else is read."""
        slices = {
            key: _Slice(
                key, self._files.tensors[key], tensor.dtype, self._device, isinstance(tensor, nn.Parameter)
            )
            for name, tensor in wanted.items()
            for key in self._sources.get(name, ())
        }
        options = LoadStateDictConfig(
            dtype=self._dtype,
            device_map={"": self._device},
            weight_mapping=self._conversions,  # type: ignore[arg-type]
        )
        info: LoadStateDictInfo
        with _one_by_one():
            info, _ = convert_and_load_state_dict_in_model(self._model, slices, options)
        info.missing_keys &= set(wanted)
        return info

    def _check(self, info: LoadStateDictInfo) -> list[str]:
        """The buffers that the files lack and the model has a first value for; all else is an error."""
        for name, found, expected in sorted(info.mismatched_keys):
            raise DstrainError(
                f"{name} is {list(found)} in the weight files, but {list(expected)} by the model's config",
                where=self._place_of(name),
                hint="config.json and the weights do not belong together",
            )
        for name, report in sorted(info.conversion_errors.items()):
            lines = [line.strip() for line in str(report).splitlines() if line.strip()]
            raise DstrainError(
                f"{name} can't be built from the weight files: {lines[-2] if len(lines) > 1 else report}",
                where=self._place_of(name),
                hint="its source tensors are missing or have another shape; download or copy the model again",
            )
        absent = sorted(info.missing_keys)
        lost = [name for name in absent if not _has_first_value(_held(self._model, name))]
        if lost:
            more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
            if lost[0] in self._files.unlisted:
                more += " (it lies in a file, and the index does not name it)"
            raise DstrainError(
                f"the weight files do not contain {lost[0]}{more}, which the model needs",
                where=str(self._files.folder),
                hint="download or copy the model again; config.json and the weights may not belong together",
            )
        return absent

    def _place_of(self, name: str) -> str:
        keys = self._sources.get(name)
        return str(self._files.tensors[keys[0]].file if keys else self._files.folder)


_CHECKED = 2**15
"""Values that are looked at together: isfinite makes several copies of them."""


class _Slice:
    """What transformers' loader takes for a tensor of a safetensors file: ``[...]`` reads it."""

    def __init__(
        self, name: str, stored: StoredTensor, dtype: torch.dtype, device: str, trained: bool
    ) -> None:
        self._name = name
        self._stored = stored
        self._dtype = dtype if stored.dtype.is_floating_point else stored.dtype
        self._device = device
        self._trained = trained

    def __getitem__(self, index: Any) -> torch.Tensor:
        if self._device == "meta":
            return torch.empty(self._stored.shape, dtype=self._dtype, device="meta")[index]
        tensor = self._stored.read(self._dtype)
        if self._trained:
            self._check(tensor)
        return tensor[index]

    def _check(self, tensor: torch.Tensor) -> None:
        """Refuse values that are no numbers, in the file or in the type of the training."""
        flat = tensor.view(-1)
        if not tensor.is_floating_point() or tensor.dtype.itemsize == 1:
            return
        if all(bool(torch.isfinite(part).all()) for part in flat.split(_CHECKED)):
            return
        if (what := self._stored.no_number()) is not None:
            raise _no_number(self._name, what, self._stored)
        raise DstrainError(
            f"{self._name} contains values that are too large for {str(self._dtype).removeprefix('torch.')}",
            where=str(self._stored.file),
            hint="--precision bf16 or fp32",
        )


def _no_number(name: str, what: str, stored: StoredTensor) -> DstrainError:
    return DstrainError(
        f"{name} contains {what}",
        where=str(stored.file),
        hint="download or copy the model again; a training that diverged leaves such weights too",
    )


def _held(model: nn.Module, name: str) -> torch.Tensor:
    parent, _, last = name.rpartition(".")
    module = model.get_submodule(parent)
    found = module._parameters.get(last)
    held = found if found is not None else module._buffers[last]
    assert held is not None, name
    return held


def _has_first_value(tensor: torch.Tensor) -> bool:
    """Whether the family's constructor gave a value: to buffers, but not to those that hold NaN (see `skeleton`)."""
    return not isinstance(tensor, nn.Parameter) and not (
        tensor.is_floating_point() and bool(tensor.isnan().any())
    )


def _empty_info() -> LoadStateDictInfo:
    return LoadStateDictInfo(
        missing_keys=set(),
        unexpected_keys=set(),
        mismatched_keys=set(),
        conversion_errors={},
        error_msgs=[],
        skipped_pp_keys=set(),
    )


@contextmanager
def _one_by_one() -> Iterator[None]:
    """Tensors are read when their turn comes, not by threads that run ahead of it; and without a progress bar."""
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    before, bar = os.environ.get(name), logging.is_progress_bar_enabled()
    os.environ[name] = "1"
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
        if bar:
            logging.enable_progress_bar()
