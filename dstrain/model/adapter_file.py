"""Reads the weights of an adapter's folder, by the names that its parameters have in a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from dstrain.errors import DstrainError
from dstrain.lora import ADAPTER_WEIGHTS, base_name, saved_name


class AdapterFile:
    """An adapter's tensors in a folder that PEFT or dstrain wrote, by the names of a model's parameters.

    Raises:
        DstrainError: there is no such file, or it is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / ADAPTER_WEIGHTS
        if not self._path.is_file():
            raise DstrainError(
                f"{folder} is not an adapter folder (it has no {ADAPTER_WEIGHTS})",
                where=str(folder),
                hint="name a folder that PEFT's save_pretrained or `dstrain export` wrote",
            )
        try:
            with safe_open(self._path, framework="pt") as opened:
                self._shapes = {
                    name: tuple(opened.get_slice(name).get_shape())
                    for name in opened.keys()  # noqa: SIM118 - no mapping
                }
        except (SafetensorError, OSError) as error:
            raise DstrainError(
                f"the adapter's weights can't be read: {error}",
                where=str(self._path),
                hint="download or copy the adapter again",
            ) from error

    def read(self, name: str) -> torch.Tensor:
        """fp32, by a parameter's name in the model. Raises DstrainError where the file lacks it."""
        wanted = saved_name(name)
        if wanted not in self._shapes:
            raise DstrainError(
                f"the adapter lacks {wanted}",
                where=str(self._path),
                hint="its configuration and its weights do not belong together",
            )
        with safe_open(self._path, framework="pt") as opened:
            tensor: torch.Tensor = opened.get_tensor(wanted)
            return tensor.float()

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Of a parameter by its name in the model; None where it is not there."""
        return self._shapes.get(saved_name(name))

    def unexpected(self, names: Mapping[str, object]) -> list[str]:
        """What it holds beside the parameters of these names; a copy of the base model's embeddings aside."""
        wanted = {saved_name(name) for name in names}
        return sorted(name for name in self._shapes.keys() - wanted if base_name(name) == name)

    def refuse_others(self, trained: Mapping[str, tuple[int, ...]]) -> None:
        """Raises DstrainError where it holds what the model has no place for, or lacks what it needs.

        Args:
            trained: the shape of each parameter of the model's adapters, by name.
        """
        where = str(self._path)
        hint = "the adapter is of another model, or its configuration and its weights do not belong together"
        if odd := self.unexpected(trained):
            raise DstrainError(f"the model has no place for the adapter's {odd[0]}", where=where, hint=hint)
        for name, shape in trained.items():
            found = self.shape(name)
            if found != shape:
                have = "is missing" if found is None else f"is {list(found)}"
                raise DstrainError(
                    f"the adapter's {name} {have}, and the model needs {list(shape)}", where=where, hint=hint
                )
