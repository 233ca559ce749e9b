"""Collects facts about a machine, without judging them."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import psutil

from dstrain.errors import DstrainError
from dstrain.launch.devices import local_devices
from dstrain.runs.record.environment import own_version

PACKAGES = ("torch", "deepspeed", "transformers")
_DRIVER = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
_DRIVER_SECONDS = 10


def facts(directory: str, runs: str, token: str) -> dict[str, Any]:
    """All that is asked of a host at once.

    Args:
        directory: where the run is started.
        runs: the folder that the run's folder will lie in, or the nearest one above it that exists.
        token: the name of a file that the asking machine has written into it.

    Returns:
        Plain values; sizes in bytes, None where something is not known.
    """
    found: dict[str, Any] = {
        "hostname": socket.gethostname(),
        "machine": _machine(),
        "python": platform.python_version(),
        "versions": {"dstrain": own_version(), **{name: _version(name) for name in PACKAGES}},
        "driver": _driver(),
        "own_addresses": _addresses(socket.gethostname()),
        "cores": os.cpu_count() or 1,
        "memory": psutil.virtual_memory().available,
        "shared_memory": _free("/dev/shm"),
        "disk": _free(runs),
        "directory": os.path.isdir(directory),
        "sees_runs": os.path.exists(os.path.join(runs, token)),
    }
    try:
        devices = local_devices()
    except DstrainError as error:
        return found | {"devices": None, "devices_error": str(error)}
    return found | {"devices": {"kind": devices.kind, "count": devices.count, "names": devices.names}}


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


def _driver() -> str | None:
    try:
        done = subprocess.run(
            _DRIVER,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_DRIVER_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.split()), None)


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
