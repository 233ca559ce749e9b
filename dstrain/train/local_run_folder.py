"""The run folder on a rank's own host, and the part of the launch record that only ranks know.

The folder may differ from the supervisor's: `dstrain.train.host_agreement` finds out whether the ranks share theirs.
This is looked at before, and needs no torch.
"""

from __future__ import annotations

import platform
import socket
import time
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from dstrain.errors import DstrainError
from dstrain.files import write_atomically
from dstrain.json_collectives import all_gather_json
from dstrain.runs.protocol import plan_digest
from dstrain.runs.record.record import append_launch
from dstrain.runs.run_folder import RunFolder
from dstrain.train.control_client import ControlClient

LATE_SECONDS = 5.0
"""So long a network file system may show a file later on another host."""


def plan_seen(folder: RunFolder) -> str | None:
    """The digest of the plan.json that lies on this host; None where there is none."""
    try:
        return plan_digest(folder.plan.read_text(encoding="utf-8"))
    except OSError:
        return None


def keep_plan(folder: RunFolder, control: ControlClient, rank: int) -> None:
    """Lay the plan that the supervisor sent into this host's run folder, where the rank reads it.

    Raises:
        DstrainError: there is none; or this is rank 0, and what it writes would not be seen where the run is watched.
    """
    if rank == 0 and control.launch and not sees(folder.launch, control.launch):
        raise DstrainError(
            f"the first host of the run, {socket.gethostname()}, can't see the run folder {folder.path}"
            " on the machine where the run was started: metrics, result and checkpoints would stay there",
            hint="start the run on the first host; or use --set runs_dir=FOLDER on storage that both share",
        )
    if control.plan is not None:
        write_atomically(folder.plan, control.plan)
    elif not folder.plan.exists():
        raise DstrainError(
            f"{socket.gethostname()} has no {folder.plan}",
            hint="`dstrain run` and `dstrain resume` send the plan to every host; launch.sh, started"
            " manually, needs a run folder that all hosts share",
        )


def sees(path: Path, content: str) -> bool:
    """Whether this host reads ``content`` in a file that another one has just written, perhaps a little late."""
    deadline = time.monotonic() + LATE_SECONDS
    while True:
        try:
            # Listing the folder makes NFS ask its server, where it would answer from what it remembers.
            if any(path.parent.iterdir()) and path.read_text(encoding="utf-8").strip() == content:
                return True
        except OSError:
            pass
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.1)


def record_launch(folder: RunFolder, first_step: int, device: torch.device) -> None:
    """Append this launch to the run's history. Collective; rank 0 writes.

    Raises:
        DstrainError: it can't be written.
    """
    devices = all_gather_json(device_record(device))
    if distributed.get_rank() == 0:
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
