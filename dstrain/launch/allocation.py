"""Reads the Slurm allocation of this process: its hosts, and the number of ranks on each."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from shutil import which

from dstrain.errors import DstrainError
from dstrain.planning.layout import Host

_ONE_NAME = re.compile(r"[A-Za-z0-9._-]+")
# squeue(1), "JOB STATE CODES": those without hosts, or that take nothing new.
_ENDED = {
    *(
        "BOOT_FAIL",
        "CANCELLED",
        "COMPLETED",
        "COMPLETING",
        "DEADLINE",
        "FAILED",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
    ),
    *("PENDING", "PREEMPTED", "REVOKED", "SPECIAL_EXIT", "TIMEOUT"),
}
# What leads commands to a Slurm, or has them behave otherwise; no job sets it, but for the first.
_OF_THE_USER = {
    *(
        "SLURM_CONF",
        "SLURM_CLUSTERS",
        "SLURM_CONF_SERVER",
        "SLURM_DEBUG_FLAGS",
        "SLURM_EXIT_ERROR",
        "SLURM_JWT",
    ),
    "SLURM_TIME_FORMAT",
}
_ANSWER_SECONDS = 10.0
_GROUP = re.compile(r"([0-9]+)(?:\(x([0-9]+)\))?")


@dataclass(frozen=True)
class Allocation:
    """``job``: its number. ``hosts``: in Slurm's order, with the slots of each."""

    job: str
    hosts: tuple[Host, ...]


def names_of(node_list: str) -> list[str]:
    """The names in a node list (``n[1-3,7]``), as Slurm's own tool spells them out. Raises DstrainError."""
    if which("scontrol") is None:
        raise DstrainError(
            "SLURM_JOB_ID is set, but Slurm's scontrol is not in PATH",
            hint="add Slurm's commands to PATH, or use --launcher local to stay on this machine",
        )
    import subprocess

    said = subprocess.run(
        ["scontrol", "show", "hostnames", node_list],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if said.returncode:
        raise DstrainError(
            f"scontrol does not know the hosts of this job: {_last_line(said.stderr)}",
            where="SLURM_JOB_NODELIST",
            hint="check that it was set by Slurm, or use --launcher local to stay on this machine",
        )
    return said.stdout.split()


def why_ended(job: str) -> str | None:
    """Why nothing can be started in a job any more, in Slurm's words; None where it can, or where Slurm does not say.

    A shell can outlive its job, and a container may have the variables of one and no way to Slurm. Where Slurm does
    not answer now, srun waits for it longer than this does.
    """
    if which("squeue") is None:
        return None
    import subprocess

    try:
        said = subprocess.run(
            ["squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=_ANSWER_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return None
    if said.returncode:
        lasting = "Invalid job id" in said.stderr or "fatal: " in said.stderr
        return _last_line(said.stderr) if lasting else None
    states = said.stdout.split()  # one for each part of a heterogeneous job
    return ", ".join(states) if states and not set(states) - _ENDED else None


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it does not say why"])[-1]


def outside_of_jobs(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment without what Slurm has set in it for a job.

    sbatch hands on what it finds: the memory or the cores that one job asked for would be asked for again by srun in
    the next, whether that job has them or not.
    """
    if "SLURM_JOB_ID" not in environ:
        return dict(environ)
    return {
        name: value
        for name, value in environ.items()
        if not name.startswith("SLURM_") or name in _OF_THE_USER
    }


def slurm_allocation(
    environ: Mapping[str, str] = os.environ, names: Callable[[str], list[str]] = names_of
) -> Allocation | None:
    """The allocation, or None outside of one.

    A host has as many slots as tasks were asked for (``--ntasks-per-node``); where only one task was, and GPUs, as
    many as GPUs. Sources: sbatch(1), "OUTPUT ENVIRONMENT VARIABLES".

    Raises:
        DstrainError: Slurm's variables are not whole, or its tools are missing.
    """
    job = environ.get("SLURM_JOB_ID")
    if not job:
        return None
    node_list = environ.get("SLURM_JOB_NODELIST")
    if not node_list:
        raise DstrainError(
            "SLURM_JOB_ID is set, but SLURM_JOB_NODELIST is not",
            hint="run the command inside sbatch or salloc, or unset SLURM_JOB_ID if this is not a Slurm job",
        )
    # One host needs no tool of Slurm, which a container inside a job may lack.
    hosts = [node_list] if _ONE_NAME.fullmatch(node_list) else names(node_list)
    tasks = _tasks(environ.get("SLURM_TASKS_PER_NODE", "1"))
    gpus = environ.get("SLURM_GPUS_ON_NODE", "")
    if set(tasks) == {1} and "SLURM_NTASKS_PER_NODE" not in environ and gpus.isdigit() and int(gpus):
        tasks = [int(gpus)] * len(hosts)
    if len(tasks) != len(hosts):
        raise DstrainError(
            f"Slurm lists {len(hosts)} hosts, but task counts for {len(tasks)}",
            hint="run the command in the shell of salloc or in the batch script, not under srun, which"
            " overwrites SLURM_TASKS_PER_NODE; or name the hosts in a --hostfile",
        )
    return Allocation(job, tuple(Host(name, slots) for name, slots in zip(hosts, tasks, strict=True)))


def _tasks(text: str) -> list[int]:
    """``2(x3),1`` is 2, 2, 2, 1."""
    found: list[int] = []
    for group in text.split(","):
        match = _GROUP.fullmatch(group)
        if match is None:
            raise DstrainError(
                f"SLURM_TASKS_PER_NODE is {text!r}", hint="unset it if this is not a Slurm job"
            )
        found += [int(match[1])] * int(match[2] or 1)
    return found
