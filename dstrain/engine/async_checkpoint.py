"""Holds the files of a checkpoint in host memory until they are written in the background.

From a GPU tensors are copied to pinned memory, without a wait for each. To pin memory takes longer than to copy to it,
so it is kept for the next checkpoint, whose tensors are the same.
"""

from __future__ import annotations

import copy
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine
from deepspeed.runtime.engine import DeepSpeedEngine


def pinned_memory(size: int) -> torch.Tensor:
    """So many bytes that a GPU copies to by itself, uint8 [size].

    ``torch.empty(..., pin_memory=True)`` would round them up to a power of two.

    Raises:
        RuntimeError: the system pins no more.
    """
    memory = torch.empty(size, dtype=torch.uint8)
    runtime: Any = torch.cuda.cudart()
    if int(runtime.cudaHostRegister(memory.data_ptr(), size, 0)) != 0:
        raise RuntimeError(f"{size} bytes can't be pinned")
    weakref.finalize(memory, runtime.cudaHostUnregister, memory.data_ptr()).atexit = False
    return memory


class Staging:
    """Memory of the host that checkpoints are copied to, one after the other.

    Args:
        device_type: of the tensors that are copied to it; others are copied to memory of their own.
        allocate: gives so many bytes as a uint8 tensor; raises RuntimeError where there are none.
        wait: until what was copied has arrived.
    """

    def __init__(
        self,
        device_type: str = "cuda",
        allocate: Callable[[int], torch.Tensor] = pinned_memory,
        wait: Callable[[], None] = lambda: get_accelerator().synchronize(),
    ) -> None:
        self.device_type = device_type
        self.bytes = 0
        """Of all that is kept, in use or not."""
        self.wait = wait
        self._allocate = allocate
        self._free: dict[int, list[torch.Tensor]] = defaultdict(list)

    def take(self, size: int) -> torch.Tensor | None:
        """So many bytes, uint8 [size]; None where the system pins no more."""
        if self._free[size]:
            return self._free[size].pop()
        try:
            made = self._allocate(size)
        except RuntimeError:
            return None
        self.bytes += size
        return made

    def give_back(self, memory: list[torch.Tensor]) -> None:
        """For `take`: what was in it is not needed any more."""
        for one in memory:
            self._free[one.numel()].append(one)
        memory.clear()

    def free_unused(self) -> None:
        """Return to the system what is not in use."""
        self.bytes -= sum(size * len(memory) for size, memory in self._free.items())
        self._free.clear()


class AsyncCheckpointStage(CheckpointEngine):  # type: ignore[misc]
    """Copies what DeepSpeed saves to host memory, for `write` to write later, while the training goes on.

    A file that finds no room is written at once. So is what DeepSpeed writes without its checkpoint engine: its
    scripts, and the swap files of ``offload: nvme``.

    Args:
        room: bytes of host memory that may be taken.
        staging: which tensors of a GPU are copied to; None: to new memory.
    """

    def __init__(self, room: int, staging: Staging | None = None) -> None:
        super().__init__()
        self.room = room
        self._staging = staging
        self.found_no_room = 0
        """Bytes that were written at once."""
        self._writer: CheckpointEngine | None = None
        self._held: list[tuple[Path, Any, list[torch.Tensor]]] = []

    @contextmanager
    def in_place_of_writer(self, engine: DeepSpeedEngine) -> Iterator[None]:
        """Within it, what the engine saves is held; `write` has the engine's own checkpoint engine write it."""
        self._writer = engine.checkpoint_engine
        engine.checkpoint_engine = self
        try:
            yield
        finally:
            engine.checkpoint_engine = self._writer

    def save(self, state_dict: Any, path: str) -> None:
        """Called by DeepSpeed, once for each file of this rank."""
        views = {_view(tensor): tensor for tensor in _tensors(state_dict)}
        size = sum(tensor.numel() * tensor.element_size() for tensor in views.values())
        if size > self.room:
            assert self._writer is not None
            self._writer.save(state_dict, path)
            self.found_no_room += size
            return
        self.room -= size
        taken: list[torch.Tensor] = []
        self._held.append((Path(path), host_copy(state_dict, self._staging, taken), taken))

    def write(self) -> Iterator[Path]:
        """Write the held files one by one and give their memory back; yields the path of each.

        Raises:
            OSError, RuntimeError: the disk takes no more (torch's own writer raises the latter).
        """
        while self._held:
            path, state, taken = self._held.pop(0)
            assert self._writer is not None
            try:
                self._writer.save(state, str(path))
            finally:
                del state
                self._give_back(taken)
            yield path

    @property
    def paths(self) -> list[Path]:
        """Of the files that wait."""
        return [path for path, _, _ in self._held]

    @property
    def states(self) -> list[tuple[Path, Any]]:
        """Of the files that wait, what is to be written."""
        return [(path, state) for path, state, _ in self._held]

    def drop(self) -> None:
        """Give back the memory of what was not written."""
        while self._held:
            _, _, taken = self._held.pop()
            self._give_back(taken)

    def _give_back(self, taken: list[torch.Tensor]) -> None:
        if self._staging is not None:
            self._staging.give_back(taken)

    def preserves_storage_sharing(self) -> bool:
        """No: of a large buffer the views alone are copied, so DeepSpeed need not copy them before."""
        return False

    def create(self, info: CheckpointCommitInfo) -> None:
        """Nothing: a folder is there."""

    def commit(self, info: CheckpointCommitInfo) -> bool:
        """Nothing: the checkpoint gets its name elsewhere."""
        return True

    def load(self, path: str, map_location: Any = None) -> Any:
        raise NotImplementedError("it only stands in for the time of a save")


def host_copy(state: Any, staging: Staging | None = None, taken: list[torch.Tensor] | None = None) -> Any:
    """A copy of a state that torch.save writes the same file from; its tensors lie in host memory.

    What the state holds once and names several times, a tied weight for one, is one in the copy too. A view of a
    larger storage becomes a tensor with a storage of its own: torch.save would write the larger one.

    Args:
        staging: gives the memory for tensors of its device.
        taken: gets that memory, to be given back when the copy is not needed any more.
    """
    copies: dict[Any, torch.Tensor] = {}
    by_object: dict[int, Any] = {}
    for tensor in _tensors(state):
        view = _view(tensor)
        if view not in copies:
            copies[view] = _host_tensor(tensor.detach(), staging, taken)
        by_object[id(tensor)] = _like(copies[view], tensor)
    if taken and staging is not None:
        staging.wait()
    # Everything else is small: plain values, and records like the loss scaler's that change from step to step.
    return copy.deepcopy(state, by_object)


def _host_tensor(
    tensor: torch.Tensor, staging: Staging | None, taken: list[torch.Tensor] | None
) -> torch.Tensor:
    """A copy; one in memory of the staging may arrive later."""
    memory = None
    if (
        staging is not None
        and taken is not None
        and tensor.device.type == staging.device_type
        and tensor.numel()
    ):
        memory = staging.take(tensor.numel() * tensor.element_size())
    if memory is None or taken is None:
        return tensor.to("cpu", copy=True)
    taken.append(memory)
    return memory.view(tensor.dtype).view(tensor.shape).copy_(tensor, non_blocking=True)


def _tensors(state: Any) -> Iterator[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from _tensors(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from _tensors(value)


def _view(tensor: torch.Tensor) -> tuple[Any, ...]:
    """What two tensors have in common that are the same elements of the same memory."""
    place = (tensor.device, tensor.untyped_storage().data_ptr(), tensor.storage_offset())
    return *place, tensor.dtype, tensor.shape, tensor.stride()


def _like(values: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """``values`` as the same kind of tensor: torch.save tells a parameter, and what gets a gradient."""
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(values, requires_grad=tensor.requires_grad)
    return values.detach().requires_grad_(tensor.requires_grad)
