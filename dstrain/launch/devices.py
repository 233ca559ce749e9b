"""Finds this machine's devices without importing torch or creating a CUDA context."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dstrain.errors import DstrainError
from dstrain.launch.gpus import ON_CPU, Driver, Gpu, amd_gpus, ask_driver

# A container's own limit, where there is one (cgroup v2, then v1).
_MEMORY_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True)
class Devices:
    """The devices of one machine.

    ``count`` is 0 on a CPU: as many processes as are asked for. ``memory_bytes`` is that of the smallest
    visible GPU, or the machine's; None when it is not known. ``precisions`` are those that DeepSpeed accepts
    on them. ``ids`` are the GPUs' numbers as the CUDA
    driver counts them, in the order of CUDA_VISIBLE_DEVICES.
    """

    kind: str
    count: int
    names: tuple[str, ...]
    memory_bytes: int | None
    ids: tuple[int, ...] = ()
    precisions: tuple[str, ...] = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Processor:
    """What the CPU says of itself: cores that this process may use, their clock, and what one does in a cycle."""

    cores: int
    hertz: float
    flops_a_cycle: dict[str, float]


def local_devices(environ: Mapping[str, str] = os.environ) -> Devices:
    """The visible GPUs, or the CPU where there are none or ``DS_ACCELERATOR=cpu`` asks for it: then nothing is asked.

    Raises:
        DstrainError: GPUs are here that can't be used: see `dstrain.launch.gpus.ask_driver`; CUDA_VISIBLE_DEVICES names
            none of them, or something that DeepSpeed's launcher can't address; DS_ACCELERATOR names neither cuda nor
            cpu, or asks for cuda where there is no GPU.
    """
    if wants_cpu(environ):
        return cpu_devices()
    return devices_of(ask_driver(environ), environ)


def wants_cpu(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the user asks for the CPU. Raises DstrainError where DS_ACCELERATOR names something else than it may."""
    wanted = environ.get("DS_ACCELERATOR", "")
    if wanted not in ("", "cpu", "cuda"):
        raise DstrainError(
            f"dstrain runs on cuda and cpu, not on {wanted!r}.", hint="unset it", where="DS_ACCELERATOR"
        )
    return wanted == "cpu"


def devices_of(driver: Driver | None, environ: Mapping[str, str]) -> Devices:
    """The driver's GPUs that are visible; without a driver, the CPU. Raises DstrainError as `local_devices` does."""
    if driver is not None:
        gpus = _visible(driver.gpus, environ.get("CUDA_VISIBLE_DEVICES"))
        sizes = [gpu.memory_bytes for gpu in gpus if gpu.memory_bytes is not None]
        return Devices(
            kind="cuda",
            count=len(gpus),
            names=tuple(gpu.name for gpu in gpus),
            memory_bytes=min(sizes) if len(sizes) == len(gpus) else None,
            ids=tuple(gpu.index for gpu in gpus),
        )
    if environ.get("DS_ACCELERATOR") == "cuda":
        raise DstrainError(
            "DS_ACCELERATOR=cuda asks for GPUs, but none is visible.",
            hint="check `nvidia-smi`, or set DS_ACCELERATOR=cpu",
            where="DS_ACCELERATOR",
        )
    other = amd_gpus()
    if other:
        raise DstrainError(
            f"this machine has {len(other)} GPUs of AMD's ({', '.join(dict.fromkeys(other))}), on which dstrain does"
            " not run",
            hint=ON_CPU,
            where="GPUs",
        )
    return cpu_devices()


def cpu_devices() -> Devices:
    """The CPU, whatever else there is."""
    precisions = ("fp32", "bf16", "fp16") if _has_half_precision() else ("fp32", "bf16")
    return Devices(
        kind="cpu", count=0, names=(_processor(),), memory_bytes=_main_memory(), precisions=precisions
    )


def processor(precisions: Sequence[str]) -> Processor:
    """The CPU that is here, for these precisions, from /proc/cpuinfo; common numbers where it says nothing.

    Two vector units that multiply and add are assumed for each core. What a core has no instructions for it computes
    in fp32, and converts.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    words, hertz = set(), 0.0
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("flags", "Features"):
                words = set(value.split())
            elif key.strip() == "cpu MHz":
                hertz = max(hertz, float(value) * 1e6)
    except (OSError, ValueError):
        pass  # not Linux
    wide = 16 if "avx512f" in words else 8 if "avx2" in words else 4
    flops = {"fp32": 2 * 2 * wide, "bf16": 2 * wide, "fp16": 2 * wide}
    for precision, native in (("bf16", {"avx512_bf16", "bf16"}), ("fp16", {"avx512_fp16", "asimdhp"})):
        if words & native:
            flops[precision] = 2 * flops["fp32"]
        if f"amx_{precision}" in words:
            flops[precision] = 1024
    return Processor(cores, hertz or 2.5e9, {precision: float(flops[precision]) for precision in precisions})


def has_async_io() -> bool:
    """Whether libaio is here, with which DeepSpeed keeps optimizer states on disk."""
    import ctypes.util

    return ctypes.util.find_library("aio") is not None


def _has_half_precision() -> bool:
    """Whether oneDNN computes in fp16 here, which DeepSpeed asks for (torch's ``_is_mkldnn_fp16_supported``)."""
    try:
        words = set(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split())
    except OSError:
        return False
    return (
        bool(words & {"avx512_fp16", "amx_fp16", "asimdhp"}) or {"avx_vnni_int8", "avx_ne_convert"} <= words
    )


def _visible(gpus: Sequence[Gpu], chosen: str | None) -> Sequence[Gpu]:
    """Apply CUDA_VISIBLE_DEVICES as the CUDA driver does: in its order, cut at the first invalid entry.

    Raises:
        DstrainError: nothing is left, or a part of a GPU is named.
    """
    if chosen is None:
        return gpus
    visible: list[Gpu] = []
    for entry in (part.strip() for part in chosen.split(",")):
        if entry.startswith("MIG-"):
            raise DstrainError(
                "DeepSpeed's launcher names GPUs by number and can't address a MIG slice.",
                hint="use whole GPUs: CUDA_VISIBLE_DEVICES=0,1",
                where="CUDA_VISIBLE_DEVICES",
            )
        if entry.startswith("GPU-"):
            matches = [gpu for gpu in gpus if gpu.uuid.startswith(entry)]
        else:
            matches = [gpu for gpu in gpus if str(gpu.index) == entry]
        if len(matches) != 1 or matches[0] in visible:
            break
        visible.append(matches[0])
    if not visible:
        last = f" to {gpus[-1].index}" if len(gpus) > 1 else ""
        raise DstrainError(
            f"{chosen!r} names none of this machine's GPUs, which are {gpus[0].index}{last}",
            hint=f"unset it, or name GPUs by number; {ON_CPU}",
            where="CUDA_VISIBLE_DEVICES",
        )
    return visible


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    except (OSError, UnicodeDecodeError):
        pass  # not Linux: the architecture's name has to do
    return os.uname().machine


def _main_memory() -> int | None:
    """Bytes of main memory that this process may use: the machine's, or its container's if less."""
    sizes = []
    try:
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemTotal:"):
                sizes.append(int(line.split()[1]) * 1024)
    except (OSError, ValueError, IndexError):
        return None
    for path in _MEMORY_LIMITS:
        try:
            sizes.append(int(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError):
            continue  # no such cgroup version, or the word "max": no limit
    return min(sizes, default=None)
