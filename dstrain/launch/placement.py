"""Decides where a run's ranks are placed, and which launcher starts them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from shutil import which
from typing import TYPE_CHECKING

from dstrain.errors import DstrainError
from dstrain.launch.allocation import Allocation, slurm_allocation, why_ended
from dstrain.launch.devices import Devices
from dstrain.launch.hosts import is_this_host, read_hostfile
from dstrain.launch.launch_spec import runs_here
from dstrain.planning.layout import Host

if TYPE_CHECKING:  # it brings pydantic, which nothing else here needs
    from dstrain.config.loader import ResolvedConfig


_GPU_EACH = "ask for as many tasks as GPUs: --gpus-per-node=N with --ntasks-per-node=N, or --gpus-per-task=1"


@dataclass(frozen=True)
class Placement:
    """The hosts and the launcher.

    Attributes:
        hosts: empty: this machine, without a name. With the launcher ``none`` they are ``node-0``, ``node-1``, ...:
            each is whatever machine says that it has this number.
        launcher: a name of `dstrain.launch.launchers.LAUNCHERS`.
        told: what the user did not ask for and should know; else None.
    """

    hosts: tuple[Host, ...]
    launcher: str
    told: str | None = None


def find_placement(
    resolved: ResolvedConfig, devices: Devices, environ: Mapping[str, str] = os.environ
) -> Placement:
    """Hosts from the hostfile, from Slurm's allocation or from ``nodes``; else this machine.

    Raises:
        DstrainError: choices that contradict each other, a bad hostfile, no allocation where one is needed.
    """
    config = resolved.config
    if config.launcher == "none":
        return _nodes(resolved, devices)
    for key in ("nodes", "processes"):
        if getattr(config, key) is not None:
            raise DstrainError(
                f"{key} is only for --launcher none, where you start dstrain on every node",
                where=str(resolved.origin(key)),
                hint="list the hosts in a --hostfile, use a Slurm allocation (dstrain submit), or use"
                " --launcher none; to plan for other nodes, use dstrain plan --device NAME",
            )
    if config.hostfile is not None and config.launcher == "slurm":
        raise DstrainError(
            "--launcher slurm can't be used with a hostfile: the hosts are those of the job, in Slurm's order",
            where=str(resolved.origin("hostfile")),
            hint="remove the hostfile, or remove --launcher slurm to reach the hosts over ssh",
        )
    if config.hostfile is not None:
        hosts = read_hostfile(config.hostfile)
        return Placement(hosts, config.launcher or ("local" if runs_here(hosts) else "pdsh"))
    if config.launcher in ("pdsh", "openmpi"):
        raise DstrainError(
            f"--launcher {config.launcher} requires a hostfile: it starts ranks on other machines",
            where=str(resolved.origin("launcher")),
            hint="add --hostfile FILE, or remove --launcher",
        )
    if config.launcher not in (None, "slurm"):
        return Placement((), config.launcher)
    allocation = slurm_allocation(environ)
    if allocation is None:
        if config.launcher == "slurm":
            raise no_allocation(str(resolved.origin("launcher")))
        return Placement((), "local")
    alone = len(allocation.hosts) == 1 and is_this_host(allocation.hosts[0].name)
    if alone and config.launcher is None:
        return Placement((), "local")
    if which("srun") is None:
        raise DstrainError(
            f"Slurm's srun is not in PATH, and SLURM_JOB_ID says that this is job {allocation.job}",
            where=str(resolved.origin("launcher")) if config.launcher else "SLURM_JOB_ID",
            hint="--launcher local stays on this machine, as for a shell or a container that has kept a job's"
            " variables; or add Slurm's commands to PATH",
        )
    reason = why_ended(allocation.job)
    if reason is not None:
        raise DstrainError(
            f"SLURM_JOB_ID says that this is job {allocation.job}, in which Slurm can't start anything: {reason}",
            where=str(resolved.origin("launcher")) if config.launcher else "SLURM_JOB_ID",
            hint="get hosts anew with `dstrain submit` or salloc; --launcher local stays on this machine, as for a"
            " shell or a container that has kept a job's variables",
        )
    _refuse_tasks_per_gpu(allocation, environ)
    if devices.kind == "cuda":
        _refuse_shared_gpus(allocation, environ)
    if config.launcher == "slurm":
        return Placement(allocation.hosts, "slurm")
    return Placement(allocation.hosts, "slurm", _why_slurm(allocation))


def _refuse_shared_gpus(allocation: Allocation, environ: Mapping[str, str]) -> None:
    """Raises DstrainError where some of the job's tasks would share a GPU."""
    gpus = environ.get("SLURM_GPUS_ON_NODE", "")
    tasks = max(host.slots for host in allocation.hosts)
    if gpus.isdigit() and 0 < int(gpus) < tasks:
        raise DstrainError(
            f"the job has {tasks} tasks per node, but {gpus} GPUs, and each rank needs a GPU of its own",
            where=f"Slurm job {allocation.job}",
            hint=_GPU_EACH,
        )


def _refuse_tasks_per_gpu(allocation: Allocation, environ: Mapping[str, str]) -> None:
    """srun would refuse it. Raises DstrainError."""
    if "SLURM_NTASKS_PER_GPU" in environ:
        raise DstrainError(
            "the job was submitted with --ntasks-per-gpu, which Slurm does not take together with the number of tasks"
            " on each node, which srun is told",
            where=f"Slurm job {allocation.job}",
            hint=_GPU_EACH,
        )


def no_allocation(where: str) -> DstrainError:
    return DstrainError(
        "no Slurm allocation found (SLURM_JOB_ID is not set)",
        where=where,
        hint="`dstrain submit` writes and submits a job; or run dstrain inside sbatch or salloc",
    )


def _why_slurm(allocation: Allocation) -> str:
    hosts = ", ".join(f"{host.name} ({host.slots})" for host in allocation.hosts[:8])
    more = f" and {len(allocation.hosts) - 8} more" if len(allocation.hosts) > 8 else ""
    return f"launcher slurm: job {allocation.job} has the hosts {hosts}{more}; --launcher local stays on this one"


def _nodes(resolved: ResolvedConfig, devices: Devices) -> Placement:
    """The same on every node, whichever asks: the plan must be, and it names them."""
    config = resolved.config
    if config.hostfile is not None:
        raise DstrainError(
            "--launcher none can't be used with a hostfile: the hosts are those on which you start dstrain",
            where=str(resolved.origin("hostfile")),
            hint="remove the hostfile and set --nodes N, or remove --launcher none",
        )
    nodes = config.nodes or 1
    if nodes > 1 and config.master_addr is None:
        raise DstrainError(
            f"--launcher none with {nodes} nodes requires --master-addr",
            where=str(resolved.origin("launcher")),
            hint="set --master-addr to a name or address of node 0 that all others can reach",
        )
    processes = config.processes or devices.count
    if not processes:
        raise DstrainError(
            "--launcher none requires --processes on machines without GPUs",
            where=str(resolved.origin("launcher")),
            hint="--processes N sets the number of ranks per node",
        )
    return Placement(tuple(Host(f"node-{number}", processes) for number in range(nodes)), "none")
