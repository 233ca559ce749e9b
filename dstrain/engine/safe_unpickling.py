"""Reads checkpoint files as data only: nothing that they name is imported or run.

A pickle can name any function to be called while it is read, and a checkpoint folder may come from others. DeepSpeed
reads its files with ``weights_only=False``. All its loading that dstrain uses asks the engine's `CheckpointEngine`
for each file, and that is where it is patched.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from dstrain.errors import DstrainError, way_out
from dstrain.runs.checkpoint.manifest import WHOLE


def _member(kind: Any, name: str) -> ZeroStageEnum:
    """Stands in for `getattr`: Python 3.11.0 to 3.11.3 write a member of an enumeration as a call of it."""
    if kind is not ZeroStageEnum:
        raise ValueError("Unsupported class getattr")
    return ZeroStageEnum[name]


# All that DeepSpeed's files hold beside tensors and plain values. These classes only carry numbers.
_HARMLESS: list[Any] = [
    *(LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address),
    *((_member, f"{module}.getattr") for module in ("builtins", "__builtin__")),  # by a pickle's protocol
]

# torch's words for a name that is not among those.
_NAMED = re.compile(r"[Uu]nsupported (?:global: )?(?:GLOBAL|class) ([\w.]+)")


def load_safely(path: str | Path, map_location: Any = "cpu", *, mapped: bool = False) -> Any:
    """What ``torch.save`` has written: tensors, plain values, and the few classes of DeepSpeed's files.

    Args:
        map_location: as for ``torch.load``.
        mapped: the tensors are mapped into memory and not read.

    Raises:
        DstrainError: the file is missing or damaged, or names anything else.
    """
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            return torch.load(path, map_location=map_location, weights_only=True, mmap=mapped)
    except Exception as error:  # a damaged file raises nearly anything
        named = _NAMED.search(str(error))
        if named:
            raise DstrainError(
                f"this checkpoint file refers to {named[1]}, which does not belong in a checkpoint:"
                " loading it could run code",
                where=str(path),
                hint="no code was run; remove this checkpoint, and the run continues from the one before it",
            ) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        hint = WHOLE
        if isinstance(error, OSError):
            reason, hint = error.strerror or reason, way_out(error)
        raise DstrainError(
            f"this checkpoint file can't be read: {reason}", where=str(path), hint=hint
        ) from error


def read_safely(engine: Any) -> None:
    """Let a DeepSpeed engine read checkpoints so. Raises DstrainError where it is told to read otherwise."""
    if engine.load_universal_checkpoint():
        raise DstrainError(
            "checkpoint.load_universal lets DeepSpeed run code that is named in checkpoint files",
            where="deepspeed",
            hint="remove it: `dstrain resume RUN` with another layout's flags needs no universal checkpoint",
        )
    engine.checkpoint_engine.load = load_safely
