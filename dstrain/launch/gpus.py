"""Asks NVIDIA's driver for the GPUs of this machine: through NVML, or with nvidia-smi where nvidia-ml-py is missing.

No CUDA context is created. That there are no GPUs is only believed where the machine does not contradict: a driver that
is slow, fails or shows none of the GPUs that are built in is an error, and not a machine without GPUs.
"""

from __future__ import annotations

import importlib
import os
import queue
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from shutil import which
from typing import Any, TypeVar

from dstrain.errors import DstrainError

DRIVER_SECONDS = 60.0
"""Within which the driver must have told everything. Where nothing keeps it loaded (persistence mode), each question
sets all GPUs up anew, which takes a host with eight of them 10 s and more."""
ON_CPU = "DS_ACCELERATOR=cpu trains on the CPU"
_SMI = (
    "nvidia-smi",
    "--query-gpu=index,uuid,driver_version,memory.total,name",
    "--format=csv,noheader,nounits",
)
_SMI_NO_DRIVER = 9  # nvidia-smi(1), "RETURN VALUE"
_SMI_NO_DEVICES = "No devices were found"
_MIB = 2**20
# What the kernel sees, with or without a driver; and what a loaded driver says of itself, also inside a container.
_PCI = Path("/sys/bus/pci/devices")
_LOADED = Path("/proc/driver/nvidia/gpus")
_PCI_NVIDIA, _PCI_DISPLAY = "0x10de", "0x03"

T = TypeVar("T")


@dataclass(frozen=True)
class Gpu:
    """One GPU. ``index``: its number, as the CUDA driver counts in the order of the PCI bus."""

    index: int
    uuid: str
    name: str
    memory_bytes: int | None


@dataclass(frozen=True)
class Driver:
    """What the driver says.

    Attributes:
        gpus: those that this process may use, before CUDA_VISIBLE_DEVICES.
        version: of the driver, such as 580.65.06.
        cuda: the newest CUDA that it has, as major and minor; None where that is not told.
    """

    gpus: tuple[Gpu, ...]
    version: str
    cuda: tuple[int, int] | None = None


class _NoDriverError(Exception):
    """There is no driver to be asked: not ``installed``, or not loaded. Its text says why."""

    def __init__(self, why: str, *, installed: bool = True) -> None:
        super().__init__(why)
        self.installed = installed


def ask_driver(environ: Mapping[str, str] = os.environ) -> Driver | None:
    """What NVIDIA's driver says of this machine's GPUs; None where there is neither a driver nor a GPU of NVIDIA's.

    Raises:
        DstrainError: there are GPUs, but they can't be used or asked about; the driver does not answer within
            `DRIVER_SECONDS`, fails, or its answer is not one.
    """
    try:
        found = _in_time(lambda: _ask(environ))
    except _NoDriverError as error:
        _none_or_refuse(str(error), installed=error.installed)
        return None
    if not found.gpus:
        _none_or_refuse("the driver shows this process none")
        return None
    return found


def amd_gpus() -> tuple[str, ...]:
    """The names of AMD's GPUs, where AMD's own library is installed (amdsmi, with ROCm) and shows some."""
    try:
        smi = importlib.import_module("amdsmi")
        smi.amdsmi_init()
        try:
            handles = smi.amdsmi_get_processor_handles()
            return tuple(str(smi.amdsmi_get_gpu_asic_info(each)["market_name"]) for each in handles)
        finally:
            smi.amdsmi_shut_down()
    except Exception:  # without its library, its driver or a GPU it raises errors of many types
        return ()


def _none_or_refuse(why: str, *, installed: bool = True) -> None:
    """Nothing, where no GPU is held by a loaded driver, nor built in where a driver is ``installed``: without one it
    may be there for a screen alone. Raises DstrainError where there are some."""
    count = len(list(_LOADED.iterdir())) if _LOADED.is_dir() else 0
    count = count or (_built_in() if installed else 0)
    if count:
        raise DstrainError(
            f"this machine has {count} NVIDIA GPU{'s' if count > 1 else ''} that can't be used: {why}",
            where="GPUs",
            hint="check `nvidia-smi`; a container needs --gpus all, and a Slurm job --gpus-per-node=N; after an update"
            f" of the driver or the kernel, restart the machine; {ON_CPU}",
        )


def _built_in() -> int:
    """GPUs of NVIDIA's on the PCI bus, as Linux lists it."""
    count = 0
    for device in _PCI.glob("*"):
        try:
            vendor = (device / "vendor").read_text(encoding="ascii").strip()
            kind = (device / "class").read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            continue  # unplugged in between
        count += vendor == _PCI_NVIDIA and kind.startswith(_PCI_DISPLAY)
    return count


def _ask(environ: Mapping[str, str]) -> Driver:
    """Raises _NoDriverError, DstrainError."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return _ask_program(environ, "nvidia-ml-py is not installed")
    try:
        return _ask_nvml(nvml)
    except nvml.NVMLError as error:
        if error.value == nvml.NVML_ERROR_LIBRARY_NOT_FOUND:
            return _ask_program(environ, "the driver's library libnvidia-ml.so.1 is not found")
        if error.value == nvml.NVML_ERROR_DRIVER_NOT_LOADED:
            raise _NoDriverError("the driver is installed, but not loaded") from error
        raise _failed(f"NVML says {str(error)!r}") from error


def _ask_nvml(nvml: Any) -> Driver:
    """Raises NVMLError; DstrainError where its answers are not what they should be."""
    nvml.nvmlInit()
    try:
        gpus: list[Gpu] = []
        for number in range(nvml.nvmlDeviceGetCount()):
            try:
                handle = nvml.nvmlDeviceGetHandleByIndex(number)
            except nvml.NVMLError as error:
                if error.value != nvml.NVML_ERROR_NO_PERMISSION:
                    raise
                continue  # it is another job's, and CUDA does not count it here either
            gpus.append(
                Gpu(
                    index=len(gpus),
                    uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
                    name=_text(nvml.nvmlDeviceGetName(handle)),
                    memory_bytes=_memory(nvml, handle),
                )
            )
        version = _text(nvml.nvmlSystemGetDriverVersion())
        major, rest = divmod(int(nvml.nvmlSystemGetCudaDriverVersion()), 1000)
        return Driver(tuple(gpus), version, (major, rest // 10))
    except (TypeError, ValueError, AttributeError) as error:
        raise _failed(f"its answer can't be read ({error})") from error
    finally:
        with suppress(nvml.NVMLError):  # what went wrong before it says more
            nvml.nvmlShutdown()


def _memory(nvml: Any, handle: Any) -> int | None:
    """None where CPU and GPU share their memory."""
    try:
        return (
            int(nvml.nvmlDeviceGetMemoryInfo(handle).total) // _MIB * _MIB
        )  # as nvidia-smi and data sheets round
    except nvml.NVMLError as error:
        if error.value != nvml.NVML_ERROR_NOT_SUPPORTED:
            raise
        return None


def _text(value: Any) -> str:
    """Versions of nvidia-ml-py before 11.5 give bytes."""
    if isinstance(value, bytes):
        return value.decode()
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _ask_program(environ: Mapping[str, str], why: str) -> Driver:
    """Ask nvidia-smi. ``why``: why NVML was not. Raises _NoDriverError, DstrainError."""
    import subprocess

    program = which(_SMI[0], path=environ.get("PATH"))
    if program is None:
        raise _NoDriverError(f"{why}, and there is no nvidia-smi in PATH", installed=False)
    try:
        done = subprocess.run(
            [program, *_SMI[1:]],
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=DRIVER_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise _silent() from None
    except OSError as error:
        raise _failed(f"{program}: {error.strerror}") from error
    said = (done.stdout + done.stderr).strip()
    last = said.splitlines()[-1] if said else "nothing"
    if done.returncode == _SMI_NO_DRIVER:
        raise _NoDriverError(f"nvidia-smi says {last!r}")
    if _SMI_NO_DEVICES in said:
        return Driver((), "")
    if done.returncode:
        raise _failed(f"nvidia-smi ended with exit code {done.returncode} and said {last!r}")
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    found = [_of_line(line) for line in lines]
    gpus = [gpu for gpu, _ in found]
    return Driver(tuple(gpus), found[0][1] if found else "")


def _of_line(line: str) -> tuple[Gpu, str]:
    """A GPU, and the driver's version. Raises DstrainError."""
    cells = [cell.strip() for cell in line.split(",", 4)]
    if len(cells) < 5 or not cells[0].isdigit() or not cells[1].startswith("GPU-"):
        raise _failed(f"nvidia-smi said {line.strip()[:80]!r} in place of a GPU")
    index, uuid, version, memory, name = cells
    # Machines that share memory between CPU and GPU answer "[N/A]".
    return Gpu(int(index), uuid, name, int(memory) * _MIB if memory.isdigit() else None), version


def _failed(what: str) -> DstrainError:
    return DstrainError(
        f"NVIDIA's driver can't be asked for the GPUs: {what}",
        where="GPUs",
        hint="check `nvidia-smi` on this machine: a driver that was updated, or a GPU that is lost, needs a restart of"
        f" the machine; {ON_CPU}",
    )


def _silent() -> DstrainError:
    return DstrainError(
        f"NVIDIA's driver did not answer within {DRIVER_SECONDS:.0f} s",
        where="GPUs",
        hint="check `nvidia-smi` and the kernel's log (dmesg) on this machine; `nvidia-smi -pm 1` (root) keeps the"
        f" driver loaded, so that it answers at once; {ON_CPU}",
    )


def _in_time(ask: Callable[[], T]) -> T:
    """What ``ask`` returns or raises. A driver that hangs can't be interrupted: its thread is left behind.

    Raises:
        DstrainError: nothing within `DRIVER_SECONDS`.
    """
    answers: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue()

    def work() -> None:
        try:
            answers.put((ask(), None))
        except BaseException as error:
            answers.put((None, error))

    threading.Thread(target=work, name="NVIDIA driver", daemon=True).start()
    try:
        found, error = answers.get(timeout=DRIVER_SECONDS + 1)  # nvidia-smi's own end comes first
    except queue.Empty:
        raise _silent() from None
    if error is not None:
        raise error
    return found  # type: ignore[return-value]
