"""A checkpoint as if another layout had saved it, for a rehearsed rank to load: shapes and types without a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dstrain.engine.checkpoint_files import MappedFiles, SavedTensor
from dstrain.engine.checkpoint_state import MASTER, SavedParameter
from dstrain.engine.client_optimizer import hugging_face_name
from dstrain.rehearsal.memory_owners import inner_optimizer


class _Unwritten(SavedTensor):
    """What is read of it is a tensor that nobody has filled."""

    def read(self) -> torch.Tensor:
        return torch.empty(self.shape, dtype=self.dtype)

    def part(self, start: int, numel: int) -> torch.Tensor:
        return torch.empty(numel, dtype=self.dtype)


class ForeignCheckpoint:
    """Stands for a `dstrain.engine.checkpoint_state.SavedState` with what this rank needs of one.

    Args:
        engine: DeepSpeed's, which has trained a step; its optimizer's states are dropped, as if it had not.
    """

    def __init__(self, engine: Any) -> None:
        optimizer = inner_optimizer(engine)
        held, state = next(((p, s) for p, s in optimizer.state.items() if s), (None, {}))
        # The others are counts of steps: plain numbers will do.
        names = [
            key for key, value in state.items() if held is not None and _numel(value) == held.numel() > 1
        ]
        values = {key: 2.0 for key in state if key not in names}
        self.folder = Path("rehearsal")
        self.ours: dict[str, Any] = {}
        self.counters = {
            name: getattr(engine, name) for name in ("global_steps", "global_samples", "skipped_steps")
        }
        self.loss_scaler = getattr(engine.optimizer, "loss_scaler", None)
        self.buffers = {
            hugging_face_name(name): _tensor(buffer, buffer.dtype)
            for name, buffer in engine.module.named_buffers()
        }
        self.parameters = {}
        for name, parameter in engine.module.named_parameters(remove_duplicate=False):
            kept = {key: _tensor(parameter, torch.float32) for key in (MASTER, *names)}
            self.parameters[hugging_face_name(name)] = SavedParameter(
                hugging_face_name(name),
                None,
                _tensor(parameter, parameter.dtype),
                kept if parameter.requires_grad else {},
                values,
            )
        optimizer.state.clear()


def _tensor(like: Any, dtype: torch.dtype) -> SavedTensor:
    return _Unwritten(tuple(getattr(like, "ds_shape", like.shape)), dtype, (), MappedFiles(1))


def _numel(value: Any) -> int:
    return value.numel() if isinstance(value, torch.Tensor) else 0
