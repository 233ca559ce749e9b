"""The ways to start the ranks: one file each, with the argv of its launcher."""

from __future__ import annotations

from collections.abc import Callable

from dstrain.launch.launch_spec import LaunchSpec
from dstrain.launch.launchers import local, none, openmpi, pdsh, slurm, torchrun

LAUNCHERS: dict[str, Callable[[LaunchSpec], list[str]]] = {
    "local": local.command,
    "pdsh": pdsh.command,
    "openmpi": openmpi.command,
    "torchrun": torchrun.command,
    "slurm": slurm.command,
    "none": none.command,
}
"""By the name that ``--launcher`` takes. Each raises DstrainError for a request that it can't start."""
