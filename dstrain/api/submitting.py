"""``submit``: writes the Slurm batch script of a run, and submits it."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dstrain.api.preflight import claim, new_run_folder, not_writable
from dstrain.config.loader import ResolvedConfig
from dstrain.errors import DstrainError
from dstrain.files import write_atomically
from dstrain.launch.allocation import outside_of_jobs
from dstrain.launch.batch_script import Job, batch_script
from dstrain.planning.checks import refuse
from dstrain.planning.layout import choose_data_parallel
from dstrain.runs.run_folder import RunFolder


@dataclass(frozen=True)
class SlurmJob:
    """A job that is ready to be submitted.

    Attributes:
        resolved: the run's config.
        folder: the run folder, not made yet.
        job: nodes, tasks and options.
        script: the text of the batch script.
        new: whether the folder is `submit`'s to make.
    """

    resolved: ResolvedConfig
    folder: RunFolder
    job: Job
    script: str
    new: bool = True


def slurm_job(
    config: ResolvedConfig,
    *,
    nodes: int = 1,
    gpus_per_node: int | None = None,
    tasks_per_node: int | None = None,
    options: Sequence[str] = (),
    resume: bool = False,
    trust: bool = False,
) -> SlurmJob:
    """The batch script of a run. The job plans and trains when it gets its turn.

    Args:
        nodes: what the job asks for.
        gpus_per_node: GPUs of each node; a rank on each.
        tasks_per_node: ranks of each node, where there are no GPUs.
        options: further options of sbatch, such as ``--time=04:00:00``.
        resume: resume the run of the config's ``name``.
        trust: import the code that the run's config names, though the run folder belongs to another user.

    Raises:
        DstrainError: the config is refused, or names other places than Slurm's.
    """
    tasks = gpus_per_node or tasks_per_node
    if tasks is None or (gpus_per_node and tasks_per_node):
        raise DstrainError(
            "the number of ranks per node is not set",
            where="--gpus-per-node",
            hint="--gpus-per-node N, or --tasks-per-node N on nodes without GPUs",
        )
    _refuse_other_places(config)
    refuse(config)
    # What does not fit is said now, and not when the job gets its turn.
    choose_data_parallel(
        config.config.pipeline,
        config.config.data_parallel,
        nodes * tasks,
        where=str(config.origin("pipeline")),
    )
    folder = new_run_folder(config, resume=resume)
    job = Job(folder.path, nodes, tasks, gpus_per_node or 0, tuple(options), trust=trust)
    return SlurmJob(config, folder, job, batch_script(job), new=not resume)


def submit(job: SlurmJob) -> tuple[str, SlurmJob]:
    """Write the script and the config, hand it to sbatch, and return the job's number, and the job with its folder.

    Raises:
        DstrainError: there is no sbatch, it takes no such job, or the folder can't be written.
    """
    if shutil.which("sbatch") is None:
        raise DstrainError(
            "Slurm's sbatch is not in PATH",
            where="dstrain submit",
            hint="run it on a login node of the cluster; without Slurm, `dstrain run` trains here or on"
            " the hosts of a --hostfile",
        )
    if job.new:
        folder = claim(job.folder, job.resolved)
        own = replace(job.job, run_folder=folder.path)
        job = replace(job, folder=folder, job=own, script=batch_script(own))
    folder = job.folder
    try:
        folder.make(job.resolved.config.access)
        write_atomically(folder.config, job.resolved.to_yaml())
        write_atomically(folder.batch_script, job.script)
    except OSError as error:
        raise not_writable(error, folder) from error
    script = str(folder.batch_script)
    done = subprocess.run(
        ["sbatch", "--parsable", script],
        env=outside_of_jobs(os.environ),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise DstrainError(
            f"sbatch refused the job: {done.stderr.strip().removeprefix('sbatch: ')}",
            where=script,
            hint=f"fix the script, then run: sbatch {shlex.quote(script)}",
        )
    return done.stdout.strip().split(";")[0], job  # "number;cluster" where there are several clusters


def _refuse_other_places(resolved: ResolvedConfig) -> None:
    config = resolved.config
    if config.hostfile is not None:
        raise DstrainError(
            "a Slurm job can't use a hostfile: Slurm chooses the hosts",
            where=str(resolved.origin("hostfile")),
            hint="remove the hostfile, and set --nodes N",
        )
    if config.launcher not in (None, "slurm", "local"):
        raise DstrainError(
            f"a Slurm job starts its ranks with srun, not with the launcher {config.launcher}",
            where=str(resolved.origin("launcher")),
            hint="remove --launcher, or adapt launch/slurm.sbatch",
        )
