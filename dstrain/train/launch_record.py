"""The part of a launch record that only ranks know: their devices, and the first step."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from dstrain.errors import DstrainError
from dstrain.runs.record.record import append_launch
from dstrain.runs.run_folder import RunFolder


def record_launch(folder: RunFolder, first_step: int, device: torch.device) -> None:
    """Append this launch to the run's history. Collective; rank 0 writes.

    Raises:
        DstrainError: it can't be written.
    """
    here = distributed.get_rank() == 0
    devices: list[Any] | None = [None] * distributed.get_world_size() if here else None
    distributed.gather_object(device_record(device), devices)
    if devices is not None:
        try:
            append_launch(folder, first_step, devices)
        except OSError as error:
            raise DstrainError(
                f"it can't be written: {error.strerror}", where=str(folder.launches)
            ) from error


def device_record(device: torch.device) -> dict[str, Any]:
    """What a rank computes with, as far as it decides the bits of its numbers: names and versions."""
    found = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    if device.type != "cuda":
        capability = torch.backends.cpu.get_cpu_capability()
        return found | {"device": _processor(), "instructions": capability}
    major, minor = torch.cuda.get_device_capability(device)
    return found | {
        "device": torch.cuda.get_device_name(device),
        "capability": f"{major}.{minor}",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        return platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
