"""Launcher for this machine: DeepSpeed's own launcher, without ssh."""

from __future__ import annotations

import os
import re

from dstrain.errors import DstrainError
from dstrain.launch.launch_spec import LaunchSpec, check_slots
from dstrain.launch.launchers import output

# deepspeed.launcher.launch, which starts the ranks of a host.
_KILLED = re.compile(output.HOST_PREFIX + r".*exits with return code = -(?P<signal>\d+)")


def command(request: LaunchSpec) -> list[str]:
    """The argv. The module is named, not the ``deepspeed`` script: that may be missing in PATH, and its first line
    breaks where the path of the virtual environment holds a space or is longer than the kernel's limit.

    Raises:
        DstrainError: there are other hosts, too few slots or too few GPUs.
    """
    if not request.runs_here:
        raise DstrainError(
            "--launcher local can't be used with a hostfile that lists other machines",
            where="--launcher",
            hint="use --launcher pdsh, or remove --launcher",
        )
    check_slots(request)
    # Without --hostfile DeepSpeed takes /job/hostfile where a machine has one. /dev/null is its "no hostfile";
    # with a real one it would ask for ssh even to localhost.
    return [
        *(request.python, "-m", "deepspeed.launcher.runner"),
        *("--hostfile", os.devnull, *_devices(request), "--master_addr", "127.0.0.1"),
        *("--master_port", str(request.master_port), "--no_local_rank", "--module", *request.worker),
    ]


def killed_rank(line: str) -> output.KilledRank | None:
    """The rank that DeepSpeed's node launcher reports as killed in a line of its output."""
    return output.killed_rank(_KILLED, line)


def _devices(request: LaunchSpec) -> list[str]:
    """--num_gpus, or --include where the user chose GPUs: --num_gpus would take 0, 1, ... whatever
    CUDA_VISIBLE_DEVICES says."""
    count = request.processes_per_host
    if request.accelerator != "cuda" or not request.device_ids:
        return ["--num_gpus", str(count)]
    if len(request.device_ids) < count:
        raise DstrainError(
            f"{count} processes need a GPU each, but only {len(request.device_ids)} are visible",
            hint=f"request at most {len(request.device_ids)} processes per host, or check CUDA_VISIBLE_DEVICES",
        )
    chosen = sorted(request.device_ids[:count])
    if chosen == list(range(count)):
        return ["--num_gpus", str(count)]
    return ["--include", "localhost:" + ",".join(map(str, chosen))]
