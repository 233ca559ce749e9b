"""A model's tensors in the family's format on disk: transformers' own conversions, reversed.

In memory a family may fuse experts, or have other names than in its files. What is used here of transformers
is private to it (5.23): `tests/model/test_model_on_disk.py` tries it with the families that convert.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model, revert_weight_conversion
from transformers.modeling_utils import LoadStateDictConfig, remove_tied_weights_from_state_dict

from dstrain.model.skeleton import empty_model

# Up to the first number: the block that a tensor belongs to.
_BLOCK = re.compile(r".*?\.\d+(?=\.)")


class OnDisk:
    """What ``save_pretrained`` would write of a model, part by part, without the model in memory.

    Args:
        like: name on disk -> tensor on meta, of the files that the model was started from: what they are
            called there, it is called again. None: what the family's newest files are called.
        dtype: of the parameters. Where a family fixes another one, and for buffers, that is kept.

    Attributes:
        tensors: name in memory -> its parameter on meta, or its buffer with its value: what is written,
            a tied weight once.
        parts: these names in groups that convert each by itself: a block each, and the rest.
        files: name on disk -> tensor on meta, in the order of the parts.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        dtype: torch.dtype = torch.float32,
        like: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.model = empty_model(config)
        if like is not None:
            # Which of the family's conversions were used is noted at the model that loads; it saves with those.
            self.model._weight_conversions = _load_shapes(config, like)[0]._weight_conversions
        held = dict(self.model.state_dict())
        for name in self.model._keys_to_ignore_on_save or ():
            held.pop(name, None)
        kept = remove_tied_weights_from_state_dict(held, self.model)
        self.tensors: dict[str, Tensor] = {
            name: tensor.to(dtype) if tensor.is_meta and tensor.dtype == torch.float32 else tensor
            for name, tensor in kept.items()
        }
        shapes = {name: tensor.to("meta") for name, tensor in self.tensors.items()}
        self.parts = _parts(self.tensors)
        self.files = self._shapes(shapes)
        whole = self.convert(shapes)
        if {n: t.shape for n, t in whole.items()} != {n: t.shape for n, t in self.files.items()}:
            # A conversion of this family reaches over several blocks.
            self.parts, self.files = [list(self.tensors)], whole

    def convert(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of whole parts, by their names in memory -> by their names on disk."""
        converted: dict[str, Tensor] = revert_weight_conversion(self.model, dict(tensors))
        return converted

    def _shapes(self, shapes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for part in self.parts:
            found |= self.convert({name: shapes[name] for name in part})
        return found


def refused_keys(config: PretrainedConfig, found: Mapping[str, Tensor]) -> list[str]:
    """What ``from_pretrained`` would complain of in a file's tensors, a line each; nothing is good.

    Args:
        found: name on disk -> tensor on meta.
    """
    model, told = _load_shapes(config, found)
    model.tie_weights(missing_keys=told.missing_keys, recompute_mapping=False)
    model._adjust_missing_and_unexpected_keys(told)
    return [
        *(f"{name} is missing" for name in sorted(told.missing_keys)),
        *(f"{name} belongs to no parameter" for name in sorted(told.unexpected_keys)),
        *(f"{name} has the shape {have}, not {want}" for name, have, want in sorted(told.mismatched_keys)),
        *(f"{name}: {error}" for name, error in sorted(told.conversion_errors.items())),
    ]


def _load_shapes(config: PretrainedConfig, files: Mapping[str, Tensor]) -> tuple[PreTrainedModel, Any]:
    """A model into which tensors on meta were loaded by their names on disk, and what transformers told."""
    model = empty_model(config)
    for name, buffer in model.named_buffers():
        path, _, last = name.rpartition(".")
        model.get_submodule(path)._buffers[last] = buffer.to("meta")
    plan = LoadStateDictConfig(
        device_map={"": "meta"},
        dtype=torch.float32,
        weight_mapping=get_model_conversion_mapping(model),  # type: ignore[arg-type]
    )
    return model, convert_and_load_state_dict_in_model(model, dict(files), plan)[0]


def _parts(names: Mapping[str, Tensor]) -> list[list[str]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        block = _BLOCK.match(name)
        groups.setdefault(block[0] if block else "", []).append(name)
    return list(groups.values())
