"""Several machines over ssh: DeepSpeed's own launcher with pdsh."""

from __future__ import annotations

from dstrain.launch.launch_spec import LaunchSpec, check_remote
from dstrain.runs.run_folder import RunFolder


def command(request: LaunchSpec) -> list[str]:
    """The argv. Raises DstrainError where something would not reach the other hosts as it is."""
    check_remote(request)
    return [
        *(request.python, "-m", "deepspeed.launcher.runner"),
        *("--hostfile", str(RunFolder(request.run_folder).hostfile), "--launcher", "pdsh"),
        # A single remote host would be run on this machine otherwise.
        *("--force_multi", "--master_addr", request.master_addr),
        *("--master_port", str(request.master_port), "--no_local_rank", "--module", *request.worker),
    ]
