"""The GPUs that the suite finds, and the versions that its results are of."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from dstrain import __version__
from dstrain.diagnostics.host_facts import PACKAGES
from dstrain.errors import DstrainError
from dstrain.launch.devices import local_devices

ON_CPU = "DSTRAIN_GPU_SUITE_ON_CPU"
"""Set to 1 the suite trains on CPUs, as one GPU: so that it is itself tested where there is none."""


def device_names() -> tuple[str, ...]:
    """Of this machine's GPUs. Fails the test where there are none, or where others would be used."""
    names, reason = _found()
    if reason:
        pytest.fail(reason, pytrace=False)
    return names


def has_devices() -> bool:
    return not _found()[1]


@cache
def _found() -> tuple[tuple[str, ...], str]:
    """Names, or why there are none."""
    if os.environ.get(ON_CPU) == "1":
        return ("CPU",), ""
    if os.environ.get("DS_ACCELERATOR") != "cuda":
        return (), "DS_ACCELERATOR is not cuda: run `make test-gpu`"
    try:
        return tuple(local_devices().names), ""
    except DstrainError as error:
        return (), str(error)


def need(gpus: int) -> None:
    """Skip the test, with the reason, where there are fewer."""
    there = len(device_names())
    if there < gpus:
        pytest.skip(f"needs {gpus} GPUs, and there are {there}")


def described() -> dict[str, Any]:
    """Cards, driver and versions, for whoever reads the results."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "dstrain": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        **found,
        **_cuda(),
    }


def _cuda() -> dict[str, Any]:
    """What PyTorch says, in a process of its own: a process that has touched CUDA can't be forked."""
    code = (
        "import json, torch; print(json.dumps({'cuda': torch.version.cuda, 'nccl': "
        "'.'.join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else None}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    found: dict[str, Any] = json.loads(done.stdout) if done.returncode == 0 else {"cuda": None, "nccl": None}
    return found


def _commit() -> str | None:
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or None
