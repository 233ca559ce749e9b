"""Ranks started by something else: a person on each node, or Kubernetes (``launcher: none``)."""

from __future__ import annotations

import shlex
from pathlib import Path

from dstrain.api.events import SILENT, Events
from dstrain.api.launch_attempt import fill_run_folder, launch_spec, locked
from dstrain.api.preflight import refuse_full_disk, refuse_other_training
from dstrain.api.running import Job


def prepare_manual_launch(job: Job, events: Events = SILENT) -> list[str]:
    """Fill the run folder; the shell commands any of which starts the ranks.

    These ranks are not monitored: if one fails, the others may hang.

    Raises:
        DstrainError: the folder holds another run, or one that is still running; it can't be written; the disk is full.
    """
    folder = job.folder
    refuse_other_training(job.planned.plan, folder, events)
    refuse_full_disk(job.planned.plan, folder)
    spec = launch_spec(job.planned, folder)
    with locked(folder):
        fill_run_folder(spec, job.planned, job.resolved, folder)
    which = [str(folder.node)] if spec.launcher == "none" else []
    ways = [["bash", str(folder.launch_script), *which]]
    if spec.launcher == "pdsh":
        alone = ["--force_multi"] if len(spec.hosts) == 1 else []
        address = ["--master_addr", spec.master_addr] if job.resolved.config.master_addr else []
        place = ["--hostfile", str(folder.hostfile), *alone, *address]
        ways.append(["deepspeed", *place, "--module", *spec.worker])
    return [shlex.join(way) for way in ways]


def prepare_for_nodes(job: Job, *, dry_run: bool = False) -> list[str]:
    """Fill the run folder; the shell command of each node, by its number.

    Raises:
        DstrainError: the folder can't be written.
    """
    if not dry_run:
        spec = launch_spec(job.planned, job.folder)
        fill_run_folder(spec, job.planned, job.resolved, job.folder)
    place = shlex.quote(str(Path.cwd()))
    return [
        f"cd {place} && " + shlex.join(["dstrain", "resume", str(job.folder.path), "--node-rank", str(node)])
        for node in range(len(job.planned.placement.hosts))
    ]
