"""Weights that bitsandbytes has quantized, as transformers writes them: packed values, and their scales beside them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from dstrain.errors import DstrainError
from dstrain.model.weights.weight_files import WeightFiles

_SCALES = re.compile(
    r"(?P<weight>.*\.weight)\."
    r"(?P<part>absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__\w+)$"
)
_SCALES_OF_8_BITS = re.compile(r"(?P<module>.*\.)(?P<part>SCB|weight_format)$")


class QuantizedWeights:
    """Those of a folder's tensors that belong to quantized weights.

    Args:
        name_of: a tensor's name in the files -> that of the model's parameter.

    Attributes:
        keys: in the files, of all that this class reads.
        names: of the model's parameters.
    """

    def __init__(self, files: WeightFiles, name_of: Mapping[str, str]) -> None:
        self._files = files
        self._parts: dict[str, dict[str, str]] = {}
        self._key_of: dict[str, str] = {}
        for key in files.tensors:
            if found := _SCALES.match(key):
                self._note(found["weight"], found["part"], key, name_of)
            elif found := _SCALES_OF_8_BITS.match(key):
                self._note(f"{found['module']}weight", found["part"], key, name_of)
        parts = (key for parts in self._parts.values() for key in parts.values())
        self.keys = frozenset((*parts, *self._key_of.values()))
        self.names = frozenset(self._key_of)

    def _note(self, weight: str, part: str, key: str, name_of: Mapping[str, str]) -> None:
        if weight not in name_of:
            return
        name = name_of[weight]
        self._key_of[name] = weight
        self._parts.setdefault(name, {})[part] = key

    def check(self, quantized: Iterable[str]) -> None:
        """Refuse files that do not agree with the model's config on what is quantized.

        Args:
            quantized: paths of the linear layers that are by the config.

        Raises:
            DstrainError: with the first weight.
        """
        if odd := sorted(self.names - {f"{path}.weight" for path in quantized}):
            raise DstrainError(
                f"{odd[0]} is quantized in the weight files, but not by the model's config",
                where=str(self._files.tensors[self._key_of[odd[0]]].file),
                hint="config.json and the weights do not belong together: download or copy the model again",
            )

    def parameter(self, bnb: Any, name: str, module: Any) -> nn.Parameter:
        """A weight as it lies in the files, on the CPU, for one of bitsandbytes' linear layers.

        Raises:
            DstrainError: its scales are missing or damaged, or it has another shape than the layer.
        """
        stored = self._files.tensors[self._key_of[name]]
        parts = self._parts[name]
        packed = stored.read(stored.dtype)
        scales = {part: self._read(key) for part, key in parts.items()}
        where = str(stored.file)
        hint = "download or copy the model again"
        parameter: nn.Parameter
        try:
            if "SCB" in scales:
                parameter = bnb.nn.Int8Params(packed, requires_grad=False, SCB=scales["SCB"]).to("cpu")
                shape = tuple(packed.shape)
            else:
                scales = {f"weight.{part}": value for part, value in scales.items()}
                parameter = bnb.nn.Params4bit.from_prequantized(packed, scales, device="cpu", module=module)
                shape = tuple(module.quant_state.shape)
        except (KeyError, ValueError, AssertionError, TypeError, AttributeError) as error:
            text = " ".join(str(error).split()) or type(error).__name__
            raise DstrainError(
                f"the scales of {name} can't be read: {text}", where=where, hint=hint
            ) from None
        wanted = (module.out_features, module.in_features)
        if shape != wanted:
            raise DstrainError(
                f"{name} is {list(shape)} in the weight files, but {list(wanted)} by the model's config",
                where=where,
                hint="config.json and the weights do not belong together",
            )
        return parameter

    def _read(self, key: str) -> torch.Tensor:
        stored = self._files.tensors[key]
        return stored.read(stored.dtype)
