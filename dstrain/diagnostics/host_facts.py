"""Collects facts about a machine, without judging them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import socket
from pathlib import Path
from typing import Any

import psutil

from dstrain.errors import DstrainError
from dstrain.launch.devices import cpu_devices, devices_of, wants_cpu
from dstrain.launch.gpus import ask_driver
from dstrain.runs.record.environment import own_version

PACKAGES = ("torch", "deepspeed", "transformers")
_CUDA = re.compile(r"^cuda\b[^=]*=\s*(?:['\"](?P<version>[0-9.]+)['\"]|None)", re.MULTILINE)


def facts(directory: str, runs: str, token: str) -> dict[str, Any]:
    """All that is asked of a host at once.

    Args:
        directory: where the run is started.
        runs: the folder that the run's folder will lie in, or the nearest one above it that exists.
        token: the name of a file that the asking machine has written into it.

    Returns:
        Plain values; sizes in bytes, None where something is not known. ``driver`` is NVIDIA's, and ``driver_cuda`` the
        newest CUDA that it has; where the CPU is asked for, they are not looked for. ``torch_cuda`` is the CUDA that
        torch is built for; "" is a torch for CPUs.
    """
    found: dict[str, Any] = {
        "hostname": socket.gethostname(),
        "machine": _machine(),
        "python": platform.python_version(),
        "versions": {"dstrain": own_version(), **{name: _version(name) for name in PACKAGES}},
        "driver": None,
        "driver_cuda": None,
        "torch_cuda": torch_cuda(),
        "own_addresses": _addresses(socket.gethostname()),
        "cores": os.cpu_count() or 1,
        "memory": psutil.virtual_memory().available,
        "shared_memory": _free("/dev/shm"),
        "disk": _free(runs),
        "directory": os.path.isdir(directory),
        "sees_runs": os.path.exists(os.path.join(runs, token)),
    }
    try:
        if wants_cpu():
            devices = cpu_devices()
        else:
            driver = ask_driver()
            if driver is not None:
                cuda = ".".join(map(str, driver.cuda)) if driver.cuda else None
                found |= {"driver": driver.version, "driver_cuda": cuda}
            devices = devices_of(driver, os.environ)
    except DstrainError as error:
        return found | {"devices": None, "devices_error": str(error)}
    return found | {"devices": {"kind": devices.kind, "count": devices.count, "names": devices.names}}


def torch_cuda() -> str | None:
    """The CUDA that the installed torch is built for, such as 13.0; "": it is built for CPUs or for other devices.

    It stands in a file of torch's, which is read: torch takes seconds to import.
    """
    try:
        spec = importlib.util.find_spec("torch")
        places = spec.submodule_search_locations if spec is not None else None
        text = Path(next(iter(places or ())), "version.py").read_text(encoding="utf-8")
    except (OSError, ValueError, StopIteration):
        return None
    match = _CUDA.search(text)
    return None if match is None else match["version"] or ""


def _machine() -> str:
    """The same for two names of one machine. Containers on one kernel differ by their host names."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        boot = ""
    return f"{boot}/{socket.gethostname()}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _addresses(name: str) -> list[str]:
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return list(dict.fromkeys(str(address[0]) for _, _, _, _, address in found))


def _free(folder: str) -> int | None:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None
