"""What a rank's tensors take while it trains: every storage that is alive, counted by bytes and class.

`MemoryCount` sees each storage when an operation makes it, and hears of its end; so the count is of tensors, without
what an allocator rounds up and without what a kernel takes and gives back inside itself. The classes are those of
`dstrain.estimate.memory.StageMemory`, and each is counted at its own fullest moment of a step; the total at the
total's fullest moment.

- parameters: what the modules' parameters look at, with DeepSpeed's flat copies behind them, and buffers of modules.
- optimizer: fp32 masters and the optimizer's state.
- gradients: what holds gradients when a backward pass has ended or the optimizer begins.
- loss: whatever is as wide as the vocabulary, and what the loss function makes.
- buffers: what DeepSpeed's code and the optimizers make beside, gathered parameters of ZeRO-3, and gradients of single
  parameters on their way to where they are held.
- activations: all else that a forward or backward pass makes.

It counts real ranks on CPUs, in the tests of the estimates, and rehearsed ones on fake GPUs.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CLASSES = ("parameters", "gradients", "optimizer", "activations", "loss", "buffers")

# Where a storage is made says what it is for, if no owner does: the innermost frame, FILE:FUNCTION, that holds one of
# these.
_PLACES = (
    (":setup_buckets", "bucket"),
    (":_fill_param_grad_accum_attribute", "gradients"),  # the accumulators of ZeRO-1 in 16 bits
    (
        ":_exec_forward_pass",
        "activations",
    ),  # dualpipev's copy of a stage's input that its first layer works with
    ("pipeline_messages.py:_irecv", "activations"),
    ("dstrain/model/loss.py", "loss"),
    ("dstrain/model/", "activations"),
    ("dstrain/engine/weight_gradients.py", "backward"),
    ("dstrain/engine/", "buffers"),
    ("deepspeed/runtime/zero/linear.py:backward", "backward"),  # the matrix multiplications of ZeRO-3
    ("deepspeed/runtime/zero/linear.py", "activations"),
    ("deepspeed/", "buffers"),
    ("torch/optim/", "buffers"),
    ("torch/utils/checkpoint.py", "activations"),
    ("torch/autograd/graph.py", "backward"),
)


# Where frames lie that stand between torch and the count.
_OF_MODES = ("/rehearsal/", "/torch/_dynamo/", "/torch/_compile.py", "/torch/utils/_python_dispatch.py")


@dataclass
class _Storage:
    """One storage: what it takes, and when it lives, in events from the beginning."""

    nbytes: int
    place: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    born: int
    trace: str = ""
    died: int | None = None
    owner: str | None = None


@dataclass
class Counted:
    """Bytes of each class at its fullest moment, and of all together at theirs; what was there, for a reader."""

    peaks: dict[str, int]
    total: int
    fullest: dict[str, list[tuple[int, str, str]]] = field(default_factory=dict)


class MemoryCount(TorchDispatchMode):
    """Counts the storages that are made inside of it.

    Args:
        vocabulary: size of the last dimension that tells logits.
        traced: keep the frames that made each storage, for a reader.
        device: ``cpu``: real tensors there; ``cuda``: fake ones on a GPU.

    Attributes:
        shapes: of the model's parameters.
        alive: bytes that are there now.
    """

    def __init__(self, vocabulary: int, *, traced: bool = False, device: str = "cpu") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.vocabulary = vocabulary
        self.traced = traced
        self.device = device
        self.shapes: set[torch.Size] = set()
        self._known: dict[int, tuple[weakref.ref[Any], _Storage]] = {}
        self._all: list[_Storage] = []
        self._clock = 0
        self._nobody_else: tuple[int, ...] | None = None
        self.alive = 0

    def __enter__(self) -> MemoryCount:
        super().__enter__()  # type: ignore[no-untyped-call]
        # A sum of two gradients that nobody else holds: what is counted for the first one then is kept.
        weight = torch.ones(1, requires_grad=True)
        (weight * 1 + weight * 1).backward()
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.add.Tensor and self._is_accumulated(args):
            func = torch.ops.aten.add_.Tensor
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf)
        return result

    def _is_accumulated(self, args: Any) -> bool:
        """Whether autograd adds a gradient to one that nobody else holds.

        It does so in place, but not where a mode looks on.
        """
        if torch.is_grad_enabled() or _caller() != "_engine_run_backward":
            return False
        first, second = args
        count = torch._C._storage_Use_Count(first.untyped_storage()._cdata)
        held = first._use_count(), sys.getrefcount(first), count
        if self._nobody_else is None:
            self._nobody_else = held
        fits = first.dtype == second.dtype and first.shape == second.shape
        return fits and held == self._nobody_else

    def own(self, owner: str, tensors: Iterable[torch.Tensor]) -> None:
        """These tensors are of this class, for all their life, unless they have an owner already."""
        for tensor in tensors:
            found = self._see(tensor)
            if found is not None and found.owner is None:
                found.owner = owner

    def now(self) -> int:
        """The number of the next event."""
        return self._clock

    def counted(self, since: int, until: int | None = None) -> Counted:
        """The fullest moments from an event on, up to another."""
        last = self._clock if until is None else until
        events: dict[int, list[tuple[int, _Storage]]] = {}
        for storage in self._all:
            if storage.born > last or (storage.died is not None and storage.died <= since):
                continue
            events.setdefault(max(storage.born, since), []).append((storage.nbytes, storage))
            if storage.died is not None and storage.died <= last:
                events.setdefault(storage.died, []).append((-storage.nbytes, storage))
        held = dict.fromkeys((*CLASSES, "total"), 0)
        best: dict[str, int] = {}
        moments: dict[str, int] = {}
        for moment in sorted(events):
            for change, storage in events[moment]:
                held[self._class(storage)] += change
                held["total"] += change
            for name, size in held.items():
                if size > best.get(name, -1):
                    best[name], moments[name] = size, moment
        total = best.pop("total", 0)
        fullest = {name: self._there(name, moment) for name, moment in moments.items()} if self.traced else {}
        return Counted(best, total, fullest)

    def _there(self, name: str, moment: int) -> list[tuple[int, str, str]]:
        """The storages of a class at a moment, like ones together, the largest first."""
        found: dict[tuple[str, str], list[int]] = {}
        for s in self._all:
            alive = s.born <= moment and (s.died is None or s.died > moment)
            if alive and name in ("total", self._class(s)):
                what = f"{self._class(s)} {tuple(s.shape)} {str(s.dtype).removeprefix('torch.')}"
                found.setdefault((what, s.trace), []).append(s.nbytes)
        rows = [(sum(sizes), f"{len(sizes)} x {what}", trace) for (what, trace), sizes in found.items()]
        return sorted(rows, reverse=True)

    def _class(self, storage: _Storage) -> str:
        if storage.owner is not None:
            return storage.owner
        floats = storage.dtype.is_floating_point
        if storage.place == "backward" and floats and storage.shape in self.shapes:
            return "buffers"
        if storage.place in ("activations", "backward"):
            wide = bool(storage.shape) and storage.shape[-1] == self.vocabulary
            return "loss" if wide and floats else "activations"
        return storage.place

    def _see(self, tensor: torch.Tensor) -> _Storage | None:
        if tensor.device.type != self.device or (self.device == "cpu" and type(tensor) is FakeTensor):
            return None
        store = tensor.untyped_storage()
        key, size = store._cdata, store.nbytes()
        if key in self._known and self._known[key][0]() is store:
            return self._known[key][1]
        if size == 0:
            return None
        self._clock += 1
        place, trace = self._place()
        found = _Storage(size, place, tuple(tensor.shape), tensor.dtype, self._clock, trace)
        if place == "bucket":  # for good: gradients look at it on their way
            found.owner = "buffers"
        self._known[key] = (weakref.ref(store, lambda _: self._end(key, found)), found)
        self._all.append(found)
        self.alive += size
        return found

    def _end(self, key: int, storage: _Storage) -> None:
        self._clock += 1
        storage.died = self._clock
        self.alive -= storage.nbytes
        if key in self._known and self._known[key][1] is storage:
            del self._known[key]

    def _place(self) -> tuple[str, str]:
        found: str | None = None
        trace: list[str] = []
        for path, name, line in _frames():
            if found is None and not name.startswith(
                "<"
            ):  # a comprehension belongs to the function around it
                found = next((place for part, place in _PLACES if part in f"{path}:{name}"), None)
            if (
                self.traced
                and len(trace) < 4
                and ("dstrain/" in path or "deepspeed/" in path or "optim" in path or "transformers/" in path)
            ):
                trace.append(f"{path.rpartition('/')[2]}:{name}:{line}")
        return found or "activations", " < ".join(trace)


def _caller() -> str:
    """The function that has called torch, below the mode's own."""
    return next((name for path, name, _ in _frames() if not any(part in path for part in _OF_MODES)), "")


def _frames() -> Iterator[tuple[str, str, int]]:
    frame: FrameType | None = sys._getframe(3)
    while frame is not None:
        yield frame.f_code.co_filename, frame.f_code.co_name, frame.f_lineno
        frame = frame.f_back
