"""The launchers: one file each, with its command line and the meaning of its output."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from dstrain.launch.launch_spec import LaunchSpec
from dstrain.launch.launchers import local, none, openmpi, pdsh, slurm, torchrun
from dstrain.launch.launchers.output import KilledRank


@dataclass(frozen=True)
class Launcher:
    """One way to start the ranks.

    Attributes:
        command: the argv; raises DstrainError for a request that it can't start.
        killed_rank: the rank that a line of the launcher's output reports as killed by a signal.
        lost_host: the host that a line reports as not reached, or not any more.
    """

    command: Callable[[LaunchSpec], list[str]]
    killed_rank: Callable[[str], KilledRank | None]
    lost_host: Callable[[str], str | None] | None = None


# DeepSpeed starts pdsh, pdsh its node launcher or torchrun: each reads what it started.
LAUNCHERS: dict[str, Launcher] = {
    "local": Launcher(local.command, local.killed_rank),
    "pdsh": Launcher(pdsh.command, local.killed_rank, pdsh.lost_host),
    "openmpi": Launcher(openmpi.command, openmpi.killed_rank),
    "torchrun": Launcher(torchrun.command, torchrun.killed_rank, pdsh.lost_host),
    "slurm": Launcher(slurm.command, slurm.killed_rank),
    "none": Launcher(none.command, torchrun.killed_rank),
}
"""By the name that ``--launcher`` takes."""

# The output may be that of another launcher than the run's own: launch.sh can be edited, and srun can start any.
_KILLED_RANK = list(dict.fromkeys(launcher.killed_rank for launcher in LAUNCHERS.values()))
_LOST_HOST = list(dict.fromkeys(launcher.lost_host for launcher in LAUNCHERS.values() if launcher.lost_host))


def find_killed_rank(lines: Iterable[str]) -> KilledRank | None:
    """The first rank that any launcher reports as killed, but for SIGTERM, which launchers send themselves."""
    found = (read(line) for line in lines for read in _KILLED_RANK)
    return next((killed for killed in found if killed is not None), None)


def find_lost_host(lines: Iterable[str]) -> str | None:
    """The first host that any launcher reports as lost."""
    found = (read(line) for line in lines for read in _LOST_HOST)
    return next((host for host in found if host is not None), None)
