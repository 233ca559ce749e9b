"""NVIDIA's NVML where there is no GPU: a module in place of nvidia-ml-py's, and a library for the real one to load."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

MIB = 2**20
H100 = ("GPU-aaaa", "NVIDIA H100 80GB HBM3", 81559 * MIB)
A100 = ("GPU-bbbb", "NVIDIA A100-SXM4-40GB", 40960 * MIB)


class NvmlModule:
    """What dstrain asks of ``pynvml``, answered for made-up GPUs.

    Args:
        gpus: UUID, name and bytes of each; None in place of the bytes: the memory is shared with the CPU. In place of a
            GPU the number of an error, which asking for it raises.
        init: the number of the error that ``nvmlInit`` raises.
        seconds: that ``nvmlInit`` takes.
    """

    NVML_ERROR_NOT_SUPPORTED, NVML_ERROR_NO_PERMISSION, NVML_ERROR_DRIVER_NOT_LOADED = 3, 4, 9
    NVML_ERROR_LIBRARY_NOT_FOUND, NVML_ERROR_GPU_IS_LOST, NVML_ERROR_LIB_RM_VERSION_MISMATCH = 12, 15, 18

    class NVMLError(Exception):
        def __init__(self, value: int) -> None:
            super().__init__(f"error {value}")
            self.value = value

    def __init__(
        self,
        gpus: Sequence[tuple[str, str, int | None] | int] = (H100, A100),
        *,
        version: Any = "570.86.15",
        cuda: Any = 12080,
        init: int | None = None,
        seconds: float = 0,
    ) -> None:
        self.gpus, self.init, self.seconds, self.open = gpus, init, seconds, 0
        self.nvmlSystemGetDriverVersion: Callable[[], Any] = lambda: version
        self.nvmlSystemGetCudaDriverVersion: Callable[[], Any] = lambda: cuda

    def nvmlInit(self) -> None:  # noqa: N802
        time.sleep(self.seconds)
        if self.init is not None:
            raise self.NVMLError(self.init)
        self.open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any:  # noqa: N802
        found = self.gpus[index]
        if isinstance(found, int):
            raise self.NVMLError(found)
        return found

    def nvmlDeviceGetUUID(self, handle: Any) -> Any:  # noqa: N802
        return handle[0]

    def nvmlDeviceGetName(self, handle: Any) -> Any:  # noqa: N802
        return handle[1]

    def nvmlDeviceGetMemoryInfo(self, handle: Any) -> Any:  # noqa: N802
        if handle[2] is None:
            raise self.NVMLError(self.NVML_ERROR_NOT_SUPPORTED)
        return SimpleNamespace(total=handle[2] + 123_456)  # no whole number of MiB, as it is on GPUs


def no_gpu_built_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine has: its kernel shows none, and no driver is loaded; `built_in` adds some."""
    monkeypatch.setattr("dstrain.launch.gpus._PCI", folder / "pci")
    monkeypatch.setattr("dstrain.launch.gpus._LOADED", folder / "loaded")


def built_in(folder: Path, *devices: tuple[str, str], loaded: int = 0) -> None:
    """The kernel shows these (vendor, class) after `no_gpu_built_in`, and a loaded driver so many."""
    for number, (vendor, kind) in enumerate(devices):
        place = folder / "pci" / f"0000:0{number}:00.0"
        place.mkdir(parents=True)
        (place / "vendor").write_text(f"{vendor}\n")
        (place / "class").write_text(f"{kind}\n")
    for number in range(loaded):
        (folder / "loaded" / f"0000:0{number}:00.0").mkdir(parents=True)


_LIBRARY = r"""
#include <string.h>
#include <unistd.h>
typedef struct { unsigned long long total, free, used; } Memory;
static const char *uuids[] = {"GPU-aaaa", "GPU-bbbb"}, *names[] = {"NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-40GB"};
static const unsigned long long mib[] = {81559, 40960};
int nvmlInitWithFlags(unsigned flags) { sleep(SECONDS); return INIT; }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int error) { return "an error without words of its own"; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) { *handle = (void *)(index + 1L); return 0; }
int nvmlDeviceGetUUID(void *handle, char *text, unsigned size)
{ strncpy(text, uuids[(long)handle - 1], size); return 0; }
int nvmlDeviceGetName(void *handle, char *text, unsigned size)
{ strncpy(text, names[(long)handle - 1], size); return 0; }
int nvmlDeviceGetMemoryInfo(void *handle, Memory *memory)
{ memory->total = mib[(long)handle - 1] << 20; return 0; }
int nvmlSystemGetDriverVersion(char *text, unsigned size) { strncpy(text, "570.86.15", size); return 0; }
int nvmlSystemGetCudaDriverVersion(int *version) { *version = 12080; return 0; }
"""


def build_library(folder: Path, *, init: int = 0, seconds: int = 0) -> Path:
    """A ``libnvidia-ml.so.1`` of an H100 and an A100 in ``folder``, which it returns.

    Args:
        init: what ``nvmlInit`` returns: 0, or the number of an error.
        seconds: that it takes.
    """
    folder.mkdir()
    (folder / "nvml.c").write_text(_LIBRARY)
    target = ["-o", str(folder / "libnvidia-ml.so.1"), str(folder / "nvml.c")]
    subprocess.run(["cc", "-shared", "-fPIC", f"-DINIT={init}", f"-DSECONDS={seconds}", *target], check=True)
    return folder
