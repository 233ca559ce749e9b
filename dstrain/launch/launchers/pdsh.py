"""Launcher for several machines over ssh: DeepSpeed's own launcher with pdsh."""

from __future__ import annotations

import re

from dstrain.launch.launch_spec import LaunchSpec, check_remote, refuse_this_host_alone
from dstrain.runs.run_folder import RunFolder

# ssh's own code for a connection that was lost or never made; pdsh waits for the other hosts all the same.
_LOST = re.compile(r"^pdsh@[^:\s]+: (?P<host>\S+): ssh exited with exit code 255\s*$")


def command(request: LaunchSpec) -> list[str]:
    """The argv. Raises DstrainError where something would not reach the other hosts as it is."""
    refuse_this_host_alone(request)
    check_remote(request)
    return [
        *(request.python, "-m", "deepspeed.launcher.runner"),
        *("--hostfile", str(RunFolder(request.run_folder).hostfile), "--launcher", "pdsh"),
        # A single remote host would be run on this machine otherwise.
        *("--force_multi", "--master_addr", request.master_addr),
        *("--master_port", str(request.master_port), "--no_local_rank", "--module", *request.worker),
    ]


def lost_host(line: str) -> str | None:
    """The host that a line of pdsh reports as not reached by ssh, or not any more."""
    match = _LOST.search(line)
    return None if match is None else match["host"]
