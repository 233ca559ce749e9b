"""Holds the files of a checkpoint in host memory until they are written in the background."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine
from deepspeed.runtime.engine import DeepSpeedEngine


class AsyncCheckpointStage(CheckpointEngine):  # type: ignore[misc]
    """Copies what DeepSpeed saves to host memory, for `write` to write later, while the training goes on.

    A file that finds no room is written at once. So is what DeepSpeed writes without its checkpoint engine: its
    scripts, and the swap files of ``offload: nvme``.

    Args:
        room: bytes of host memory that may be taken.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.found_no_room = 0
        """Bytes that were written at once."""
        self._writer: CheckpointEngine | None = None
        self._held: list[tuple[Path, Any]] = []

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
        self._held.append((Path(path), host_copy(state_dict)))

    def write(self) -> Iterator[Path]:
        """Write the held files one by one and give their memory back; yields the path of each.

        Raises:
            OSError, RuntimeError: the disk takes no more (torch's own writer raises the latter).
        """
        while self._held:
            path, state = self._held.pop(0)
            assert self._writer is not None
            self._writer.save(state, str(path))
            del state
            yield path

    @property
    def paths(self) -> list[Path]:
        """Of the files that wait."""
        return [path for path, _ in self._held]

    def drop(self) -> None:
        """Give back the memory of what was not written."""
        self._held.clear()

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


def host_copy(state: Any) -> Any:
    """A copy of a state that torch.save writes the same file from; its tensors lie in host memory.

    What the state holds once and names several times, a tied weight for one, is one in the copy too. A view of a
    larger storage becomes a tensor with a storage of its own: torch.save would write the larger one.
    """
    copies: dict[Any, torch.Tensor] = {}
    by_object: dict[int, Any] = {}
    for tensor in _tensors(state):
        view = _view(tensor)
        if view not in copies:
            copies[view] = tensor.detach().to("cpu", copy=True)
        by_object[id(tensor)] = _like(copies[view], tensor)
    # Everything else is small: plain values, and records like the loss scaler's that change from step to step.
    return copy.deepcopy(state, by_object)


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
