"""Maps DeepSpeed's checkpoint files, and assembles tensors that are spread over several of them."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dstrain.engine.safe_unpickling import load_safely
from dstrain.errors import DstrainError
from dstrain.runs.checkpoint.manifest import WHOLE

# All files of one checkpoint lie in one folder; DeepSpeed wants a tag below a directory.
TAG = "state"

PARAMETER_NAMES = "parameter_names"
"""Among the saved state: names by parameter group, with ZeRO-0, whose files of DeepSpeed have none."""


class MappedFiles:
    """Opened checkpoint files, mapped into memory and not read; the last few stay open."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._open: OrderedDict[Path, dict[str, Any]] = OrderedDict()

    def __getitem__(self, path: Path) -> dict[str, Any]:
        if path in self._open:
            self._open.move_to_end(path)
            return self._open[path]
        content: dict[str, Any] = load_safely(path, mapped=True)
        self._open[path] = content
        while len(self._open) > self._most:
            self._open.popitem(last=False)
        return content


@dataclass(frozen=True)
class Piece:
    """Part of a tensor: ``numel`` elements from ``start`` of the flat tensor at ``keys`` inside a file."""

    path: Path
    keys: tuple[Any, ...]
    start: int
    numel: int


@dataclass(frozen=True)
class SavedTensor:
    """A tensor that is not read yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]
    files: MappedFiles = field(repr=False)

    def read(self) -> torch.Tensor:
        """The whole tensor, on CPU. May be a view of the mapped file: copy it before writing to it."""
        held, whole = sum(piece.numel for piece in self.pieces), math.prod(self.shape)
        if held != whole:
            raise self._incomplete(held, whole)
        return self.part(0, whole).view(self.shape)

    def part(self, start: int, numel: int) -> torch.Tensor:
        """``numel`` of its numbers from ``start``, flat, on CPU; no others are read. A view, as above."""
        parts, first = [], 0
        for piece in self.pieces:
            low, high = max(start - first, 0), min(start + numel - first, piece.numel)
            first += piece.numel
            if low < high:
                value: Any = self.files[piece.path]
                for key in piece.keys:
                    value = value[key]
                parts.append(value.detach().reshape(-1)[piece.start + low : piece.start + high])
        flat = parts[0] if len(parts) == 1 else torch.cat(parts) if parts else torch.empty(0)
        if flat.numel() != numel:
            raise self._incomplete(flat.numel(), numel)
        return flat.to(self.dtype)

    def _incomplete(self, held: int, wanted: int) -> DstrainError:
        return DstrainError(
            f"the checkpoint holds {held} of {wanted} values of a parameter",
            where=str(self.pieces[0].path.parent),
            hint=WHOLE,
        )
