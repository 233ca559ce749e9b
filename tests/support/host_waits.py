"""Counts where the host would wait for a GPU: operations whose outcome Python, or the shape of a tensor, depends on."""

from __future__ import annotations

import traceback
from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
WAITS = (
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten.unique_consecutive.default,
    aten._unique2.default,
)


class HostWaits(TorchDispatchMode):
    """Within it, `seen` counts each by the line of Python that has called it, without torch's own files."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in WAITS:
            frames = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename]
            caller = next(f for f in reversed(frames) if not f.filename.endswith("host_waits.py"))
            self.seen[f"{caller.filename.rpartition('site-packages/')[2]}:{caller.lineno}"] += 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        return sum(self.seen.values())
