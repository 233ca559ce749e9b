"""Stand-ins for DeepSpeed's compiled operators on host memory: Adam for offloaded states, and files on NVMe."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from deepspeed.ops.op_builder import AsyncIOBuilder, CPUAdamBuilder

from dstrain.rehearsal.replacing import replace


class _FakeFiles:
    """Reads and writes of a disk, which are done at once and leave tensors as they are."""

    def __init__(self, **options: Any) -> None:
        self._pending = 0

    def async_pread(self, buffer: torch.Tensor, path: str, offset: int = 0) -> int:
        self._pending += 1
        return 0

    async_pwrite = async_pread

    def wait(self) -> int:
        done, self._pending = self._pending, 0
        return done

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.is_pinned()

    def new_cpu_locked_tensor(self, elements: int, like: torch.Tensor) -> torch.Tensor:
        return torch.empty(elements, dtype=like.dtype).pin_memory()

    def free_cpu_locked_tensor(self, tensor: torch.Tensor) -> bool:
        return True


def install_host_operators() -> None:
    """For the rest of this process: the real ones are compiled, and work on the addresses of tensors."""
    nothing = SimpleNamespace(
        create_adam=lambda *args: 0, adam_update=lambda *args: 0, destroy_adam=lambda *args: 0
    )
    replace(CPUAdamBuilder, "load", lambda builder, verbose=True: nothing)
    replace(AsyncIOBuilder, "load", lambda builder, verbose=True: SimpleNamespace(aio_handle=_FakeFiles))
