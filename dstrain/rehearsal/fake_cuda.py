"""Stand-ins for ``torch.cuda``: one GPU of the kind that the plan is for, which is idle and has nothing to wait for.

Only what DeepSpeed, transformers and dstrain ask is answered; anything else goes to torch, which says that there is no
GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from dstrain.rehearsal.replacing import replace

Waited = Callable[[str], None]


@dataclass(frozen=True)
class FakeGpu:
    """What a GPU says of itself.

    Attributes:
        name: as ``nvidia-smi`` has it.
        memory_bytes: all of it.
        capability: CUDA's compute capability.
        devices: GPUs of a host.
    """

    name: str
    memory_bytes: int
    capability: tuple[int, int]
    devices: int

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> FakeGpu:
        """From JSON."""
        major, minor = record["capability"]
        return cls(**{**record, "capability": (major, minor)})


class FakeMemory:
    """What ``torch.cuda`` says of memory; whoever counts it sets ``counted``."""

    def __init__(self) -> None:
        self.counted: Callable[[], int] = lambda: 0

    def now(self, device: Any = None) -> int:
        return self.counted()


class _Stream:
    """All work is done at once, so streams are one."""

    waited: Waited
    device = torch.device("cuda:0")
    device_index, device_type, cuda_stream, stream_id = 0, 1, 0, 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> Any:
        return event or _Event()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        type(self).waited("stream.synchronize")

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *exception: object) -> None:
        pass


class _Event:
    waited: Waited

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def wait(self, stream: Any = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Any) -> float:
        return 1.0

    def synchronize(self) -> None:
        type(self).waited("event.synchronize")


def install_fake_cuda(gpu: FakeGpu, memory: FakeMemory, waited: Waited) -> None:
    """Let ``torch.cuda`` answer for one fake GPU, for the rest of this process.

    This thread's backward passes run in it, and not in a thread for the GPU: that one may want the interpreter's lock
    while the process ends, and abort it.

    Args:
        waited: told of each call that waits for the device.
    """
    torch.autograd.set_multithreading_enabled(False)
    _Stream.waited = staticmethod(waited)
    _Event.waited = staticmethod(waited)
    properties = SimpleNamespace(
        name=gpu.name,
        total_memory=gpu.memory_bytes,
        major=gpu.capability[0],
        minor=gpu.capability[1],
        multi_processor_count=132,
        gcnArchName="",
        regs_per_multiprocessor=65536,
    )
    stream = _Stream()
    answers: dict[str, Any] = {
        **dict.fromkeys(("is_available", "is_initialized", "_is_compiled", "is_bf16_supported"), True),
        **dict.fromkeys(("is_current_stream_capturing", "_is_in_bad_fork"), False),
        **dict.fromkeys(("set_device", "empty_cache", "manual_seed", "manual_seed_all", "set_rng_state")),
        **dict.fromkeys(("set_rng_state_all", "_lazy_init", "_lazy_call", "init", "reset_peak_memory_stats")),
        **dict.fromkeys(("current_stream", "default_stream"), stream),
        "device_count": gpu.devices,
        "current_device": 0,
        "get_device_properties": properties,
        "get_device_capability": gpu.capability,
        "get_device_name": gpu.name,
        "memory_stats": {},
        "get_rng_state_all": [],
    }
    for name, answer in answers.items():
        replace(torch.cuda, name, _always(answer))
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        replace(torch.cuda, name, memory.now)
    replace(torch.cuda, "get_rng_state", lambda device=None: torch.zeros(16, dtype=torch.uint8))
    replace(torch.cuda, "synchronize", lambda device=None: waited("cuda.synchronize"))
    replace(torch.cuda, "Stream", _Stream)
    replace(torch.cuda, "Event", _Event)
    replace(torch.cuda, "stream", lambda stream: nullcontext())
    replace(torch.cuda, "device", lambda device: nullcontext())
    replace(torch.cuda.nvtx, "range_push", _always(0))
    replace(torch.cuda.nvtx, "range_pop", _always(0))
    replace(torch.cuda.nccl, "version", _always((2, 29, 7)))
    replace(torch.Tensor, "record_stream", lambda self, stream: None)
    for kind, dtype in (
        ("Byte", torch.uint8),
        ("Float", torch.float32),
    ):  # of a torch without CUDA: no such types
        replace(torch.cuda, f"{kind}Tensor", _tensor_type(dtype))


def _always(answer: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: answer


def _tensor_type(dtype: torch.dtype) -> Callable[[Any], torch.Tensor]:
    return lambda values: torch.tensor(values, dtype=dtype, device="cuda")
