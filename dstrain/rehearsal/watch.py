"""Sees every operation of a rehearsed rank: storages, collectives, places where the host waits for the GPU."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed import ProcessGroup
from torch.utils._pytree import tree_leaves

from dstrain.rehearsal.fake_ranks import FakeGroups
from dstrain.rehearsal.fake_tensors import dtype_name, is_pinned
from dstrain.rehearsal.memory_count import MemoryCount

# torch's operations behind torch.distributed's functions, and which argument holds the whole tensor.
_COLLECTIVES = {
    "allreduce_": ("all_reduce", 0),
    "allreduce_coalesced_": ("all_reduce", 0),
    "reduce_": ("reduce", 0),
    "broadcast_": ("broadcast", 0),
    "allgather_": ("all_gather", 0),
    "_allgather_base_": ("all_gather_into_tensor", 0),
    "allgather_coalesced_": ("all_gather", 0),
    "allgather_into_tensor_coalesced_": ("all_gather_into_tensor", 0),
    "reduce_scatter_": ("reduce_scatter", 1),
    "_reduce_scatter_base_": ("reduce_scatter_tensor", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter_tensor", 1),
    "alltoall_": ("all_to_all", 1),
    "alltoall_base_": ("all_to_all", 1),
    "gather_": ("gather", 1),
    "scatter_": ("scatter", 1),
    "send": ("send", 0),
    "recv_": ("recv", 0),
    "recv_any_source_": ("recv", 0),
}
_ANSWER = "_rehearsed_answer"
# Frames of these are no place that a reader looks for.
_INNER = (
    "/torch/",
    "/contextlib.py",
    "/rehearsal/",
    "/engine/traffic_count.py",
    "/deepspeed/comm/",
    "/deepspeed/accelerator/",
    "/deepspeed/utils/",
)
_PACKAGES = ("site-packages/", "dist-packages/")


@dataclass(frozen=True)
class Message:
    """One kind of collective or message.

    Attributes:
        phase: in which it was.
        kind: the name of torch.distributed's function; ``... of JSON`` for plain values.
        dtype, elements: of the whole tensor.
        device: where that lies.
        ranks: of its group.
    """

    phase: str
    kind: str
    dtype: str
    elements: int
    device: str
    ranks: int


@dataclass(frozen=True)
class Wait:
    """A place where the host waits for the GPU.

    Attributes:
        what: ``item``, ``nonzero``, ``copy to host``, ``copy to device``, ``barrier``, or a function of ``torch.cuda``.
        where: file and line, and the line of dstrain's that led there.
    """

    phase: str
    what: str
    where: str


@dataclass(frozen=True)
class WrongDevice:
    """A tensor in a collective whose group can't reach it."""

    phase: str
    what: str
    where: str


class Watch(MemoryCount):
    """Counts what is inside of it, and answers for the numbers that fake tensors do not hold.

    What the host asks of a tensor: tensors are equal where they are compared, nothing is inf or nan, flags are off,
    other numbers are one, and one element is not zero.

    Attributes:
        phase: what the rank is doing.
        groups: the process groups, which take tensors of one device each.
        seen_by: told of each operation and its arguments.
    """

    def __init__(self, vocabulary: int, *, traced: bool = False) -> None:
        super().__init__(vocabulary, device="cuda", traced=traced)
        self.phase = "build"
        self.groups = FakeGroups()
        self.seen_by: Callable[[Any, Any], None] = lambda operation, arguments: None
        self.messages: Counter[Message] = Counter()
        self.waits: Counter[Wait] = Counter()
        self.wrong_devices: Counter[WrongDevice] = Counter()
        self._aten: Any = torch.ops.aten

    def waited(self, what: str) -> None:
        """The host waits here."""
        self.waits[Wait(self.phase, what, place())] += 1

    def told_json(self, kind: str, size: int, device: str, ranks: int) -> None:
        """A collective of plain values."""
        self.messages[Message(self.phase, f"{kind} of JSON", "uint8", size, device, ranks)] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is self._aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            if args[0].device.type == "cuda":
                self.waited("item")
            return _answer(args[0])
        if func is self._aten.nonzero.default and isinstance(args[0], FakeTensor):
            if args[0].device.type == "cuda":
                self.waited("nonzero")
            found: torch.Tensor = args[0].new_empty((1, args[0].dim()), dtype=torch.int64)
            return found
        self.seen_by(func, args)
        if func.namespace == "c10d":
            self._collective(func, args)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if func is self._aten._to_copy.default:
            self._copy(args[0], result, bool(kwargs.get("non_blocking")))
        elif func is self._aten.copy_.default:
            self._copy(args[1], result, bool(args[2] if len(args) > 2 else kwargs.get("non_blocking")))
        self._keep_answer(func, args, result)
        return result

    def _collective(self, func: Any, args: Any) -> None:
        name = func.overloadpacket.__name__
        if name in ("barrier", "monitored_barrier_"):
            self.waited("barrier")
            return
        if name not in _COLLECTIVES:
            return
        kind, whole = _COLLECTIVES[name]
        group = ProcessGroup.unbox(next(arg for arg in args if isinstance(arg, torch.ScriptObject)))
        tensors = [leaf for leaf in tree_leaves(args[whole]) if isinstance(leaf, torch.Tensor)]
        devices = {leaf.device.type for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)}
        elements = sum(tensor.numel() for tensor in tensors)
        dtype = dtype_name(tensors[0].dtype)
        device = " and ".join(sorted(devices))
        self.messages[Message(self.phase, kind, dtype, elements, device, group.size())] += 1
        # What torch.distributed makes of Python objects, it puts where the group takes it.
        if devices != {self.groups.takes(group)}:
            what = f"{kind} of {elements:,} x {dtype} on {device}"
            self.wrong_devices[WrongDevice(self.phase, what, place())] += 1

    def _copy(self, source: Any, target: Any, beside: bool) -> None:
        if not isinstance(source, torch.Tensor) or source.device.type == target.device.type:
            return
        if "meta" in (source.device.type, target.device.type):
            return
        to_host = target.device.type == "cpu"
        if not beside or not (to_host or is_pinned(source)):
            self.waited("copy to host" if to_host else "copy to device")

    def _keep_answer(self, func: Any, args: Any, result: Any) -> None:
        """Remember what a reader of these numbers would be told."""
        first = args[0] if args and isinstance(args[0], torch.Tensor) else None
        answer = getattr(first, _ANSWER, None)
        # isinf(x) is abs(x) == inf, and isnan(x) is x != x.
        if func in (self._aten.eq.Tensor, self._aten.ne.Scalar):
            answer = True
        elif func in (self._aten.eq.Scalar, self._aten.ne.Tensor):
            answer = False
        elif func in (self._aten.bitwise_not.default, self._aten.logical_not.default) and answer is not None:
            answer = not answer
        if answer is not None:
            for leaf in tree_leaves(result):
                if isinstance(leaf, FakeTensor):
                    setattr(leaf, _ANSWER, answer)


def _answer(tensor: torch.Tensor) -> bool | int | float:
    known = getattr(tensor, _ANSWER, None)
    if tensor.dtype == torch.bool:
        return bool(known)
    if tensor.dtype.is_floating_point:
        return 1.0 if known is None else float(known)
    if known is not None:
        return int(known)
    return 0 if tensor.dtype == torch.uint8 else 1


def place() -> str:
    """Where the caller of torch stands: file:line, and behind ``<`` the line of dstrain's that led there."""
    found = ""
    for path, line in _lines():
        if any(part in path for part in _INNER):
            continue
        short = shortened(path)
        ours = short.startswith("dstrain/")
        if not found:
            found = f"{short}:{line}"
            if ours:
                return found
        elif ours:
            return f"{found} < {short}:{line}"
    return found or "autograd"


def shortened(path: str) -> str:
    """A file's path from its package on."""
    for folder in _PACKAGES:
        if folder in path:
            return path.rpartition(folder)[2]
    _, package, rest = path.rpartition("/dstrain/")
    return f"dstrain/{rest}" if package else path


def _lines() -> Iterator[tuple[str, int]]:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        yield frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back
