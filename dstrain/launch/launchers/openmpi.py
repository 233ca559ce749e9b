"""Launcher for several machines: DeepSpeed's own launcher with Open MPI's mpirun."""

from __future__ import annotations

import os
import re
import shutil

from dstrain.errors import DstrainError
from dstrain.launch.launch_spec import LaunchSpec, check_remote, refuse_this_host_alone
from dstrain.launch.launchers import output
from dstrain.runs.run_folder import RunFolder

IN_QUOTES = re.compile(r"[^\w@%+=:,./-]")
"""What deepspeed.launcher.multinode_runner puts a value in quotes for, which no shell takes away here."""
# Read before a rank could remove them itself. So is PYTHONPATH, which names dstrain's own folder too; a rank whose
# dstrain is installed needs none of it.
_READ_AT_THE_START = ("LD_LIBRARY_PATH",)
_KILLED = re.compile(r"process rank \d+ with PID \d+ on node (?P<host>\S+) exited on signal (?P<signal>\d+)")


def command(request: LaunchSpec) -> list[str]:
    """The argv; a rank learns its number from Open MPI's variables (`train.rank_environment`).

    Raises:
        DstrainError: Open MPI is not installed here, or something would not reach the other hosts as it is.
    """
    if shutil.which("mpirun") is None or shutil.which("ompi_info") is None:
        raise DstrainError(
            "Open MPI is not installed here (no mpirun, no ompi_info in PATH)",
            where="--launcher",
            hint="install it on every host (Debian: apt-get install openmpi-bin), or --launcher pdsh",
        )
    refuse_this_host_alone(request)
    check_remote(request)
    for name in _READ_AT_THE_START:
        found = IN_QUOTES.search(request.environment.get(name, ""))
        if found is not None:
            raise DstrainError(
                f"{name} contains {found.group()!r}, which does not reach the ranks of Open MPI as it is",
                where=f"environment: {name}",
                hint="use folders of plain characters, or --launcher pdsh",
            )
    # Ranks are numbered host after host, as the plan has them. mpirun refuses to run for root unless told.
    options = "--map-by slot" + (" --allow-run-as-root" if os.geteuid() == 0 else "")
    return [
        *(request.python, "-m", "deepspeed.launcher.runner"),
        *("--hostfile", str(RunFolder(request.run_folder).hostfile), "--launcher", "openmpi"),
        *(f"--launcher_args={options}", "--force_multi", "--master_addr", request.master_addr),
        *("--master_port", str(request.master_port), "--no_local_rank", "--module", *request.worker),
    ]


def killed_rank(line: str) -> output.KilledRank | None:
    """The rank that mpirun reports as killed in a line of its output."""
    return output.killed_rank(_KILLED, line)
