"""Counts where the host would wait for a GPU: operations whose outcome Python, or the shape of a tensor, depends on."""

from __future__ import annotations

import traceback
from collections import Counter
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
    """Within it, `seen` counts each by the line of Python that has called it, without torch's own files.

    On a CPU all tensors lie on the device that is waited for. `on_host` brings one to the host, which is a wait; what
    is computed of such alone, and what torch's optimizers count, lies on the host too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        self._on_host: set[StorageWeakRef] = set()

    def on_host(self, value: torch.Tensor) -> torch.Tensor:
        """In place of `dstrain.engine.deepspeed_patches.on_host`."""
        self._count()
        copied = value.clone()
        self._on_host.add(StorageWeakRef(copied.untyped_storage()))
        return copied

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        if given and all(StorageWeakRef(one.untyped_storage()) in self._on_host for one in given):
            outcome = func(*args, **(kwargs or {}))
            made = [one for one in tree_leaves(outcome) if isinstance(one, torch.Tensor)]
            self._on_host |= {StorageWeakRef(one.untyped_storage()) for one in made}
            return outcome
        if func in WAITS:
            self._count()
        return func(*args, **(kwargs or {}))

    def _count(self) -> None:
        stack = traceback.extract_stack()
        if any("/torch/optim/" in frame.filename for frame in stack):
            return
        frames = [
            f for f in stack if "/torch/" not in f.filename and not f.filename.endswith("host_waits.py")
        ]
        caller = frames[-1]
        self.seen[f"{caller.filename.rpartition('site-packages/')[2]}:{caller.lineno}"] += 1

    @property
    def total(self) -> int:
        return sum(self.seen.values())
