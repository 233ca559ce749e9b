"""Launcher inside a Slurm allocation: srun, one task per rank."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from dstrain.launch.launch_spec import LaunchSpec, check_slots
from dstrain.launch.launchers import output
from dstrain.launch.placement import no_allocation

# srun has the signal in strsignal(3)'s words.
_KILLED = re.compile(
    r"^srun: error: (?P<host>\S+): tasks? \S+: (?P<description>[A-Z][a-z ]+?)(?: \(core dumped\))?$"
)


def command(request: LaunchSpec, environ: Mapping[str, str] = os.environ) -> list[str]:
    """The argv; a rank learns its number from Slurm's variables (`train.rank_environment`).

    DeepSpeed's own ``--launcher slurm`` sets neither a rank nor the master's address for its ranks.

    Raises:
        DstrainError: this is no allocation, or a host has too few slots.
    """
    if "SLURM_JOB_ID" not in environ:
        raise no_allocation("--launcher")
    check_slots(request)
    names = ",".join(host.name for host in request.hosts)
    # What sbatch was asked for; since Slurm 22.05 srun does not take it over by itself.
    cores = environ.get("SLURM_CPUS_PER_TASK")
    return [
        *("srun", f"--nodes={len(request.hosts)}", f"--ntasks={request.world_size}"),
        *(f"--ntasks-per-node={request.processes_per_host}", f"--nodelist={names}"),
        *([f"--cpus-per-task={cores}"] if cores else []),
        # Ranks are numbered host after host, as the plan has them; each sees all devices of its host and takes
        # the one of its local rank; the first that fails ends all. Overlap: the shell of `srun --pty bash`, and the
        # ranks of the launch before, may still hold what these need.
        *("--distribution=block", "--export=ALL", "--kill-on-bad-exit=1", "--overlap", "--unbuffered"),
        # Slurm sends TERM to the ranks of a job that it preempts: they end their step, save and leave. It would kill
        # those that are still starting.
        *("sh", "-c", 'trap "" TERM; exec "$@"', "sh"),
        *(request.python, "-u", "-m", *request.worker),
    ]


def killed_rank(line: str) -> output.KilledRank | None:
    """The rank that srun reports as killed in a line of its output."""
    return output.killed_rank(_KILLED, line)
