"""``dstrain submit``: write a Slurm batch script for a run, and submit it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from dstrain.cli.options import choices, given, layers
from dstrain.errors import DstrainError

if TYPE_CHECKING:
    from dstrain.config.loader import ResolvedConfig
    from dstrain.launch.batch_script import Job
    from dstrain.runs.run_folder import RunFolder


@click.command("submit")
@layers
@choices
@click.option("--gpus-per-node", type=click.IntRange(1), help="GPUs of each node; a rank on each.")
@click.option("--tasks-per-node", type=click.IntRange(1), help="Ranks of each node, where there are no GPUs.")
@click.option(
    "--sbatch",
    "options",
    multiple=True,
    metavar="OPTION",
    help="One more option of sbatch, as --sbatch --time=04:00:00 or --sbatch --partition=gpu. Repeatable.",
)
@click.option("--dry-run", is_flag=True, help="Show the batch script, write and submit nothing.")
@click.option("--resume", is_flag=True, help="Go on in the run folder of this --name.")
def command(
    recipe: str | None,
    config_file: str | None,
    settings: tuple[str, ...],
    gpus_per_node: int | None,
    tasks_per_node: int | None,
    options: tuple[str, ...],
    dry_run: bool,
    resume: bool,
    **flags: Any,
) -> None:
    """Write a Slurm batch script for a run, and submit it.

    The job plans and trains when it gets its turn. It saves and goes back into the queue when its time is over, and
    goes on from there; so it does when it was preempted.
    """
    from dstrain.api.preflight import new_run_folder
    from dstrain.config.loader import load_config
    from dstrain.launch.batch_script import Job, batch_script
    from dstrain.planning.checks import refuse

    nodes = flags.pop("nodes") or 1
    tasks = gpus_per_node or tasks_per_node
    if tasks is None or (gpus_per_node and tasks_per_node):
        raise DstrainError(
            "how many ranks does each node hold?",
            where="--gpus-per-node",
            hint="--gpus-per-node N, or --tasks-per-node N where there are no GPUs",
        )
    resolved = load_config(recipe=recipe, config_file=config_file, settings=settings, flags=given(flags))
    _refuse_other_places(resolved)
    refuse(resolved)
    _refuse_what_does_not_fit(resolved, nodes * tasks)
    folder = new_run_folder(resolved, resume=resume)
    job = Job(folder.path, nodes, tasks, gpus_per_node or 0, options)
    text = batch_script(job)
    if dry_run:
        click.echo(text, nl=False)
        return
    number = _submit(resolved, folder, text)
    _tell(number, folder, job)


def _refuse_other_places(resolved: ResolvedConfig) -> None:
    config = resolved.config
    if config.hostfile is not None:
        raise DstrainError(
            "a Slurm job has the hosts that Slurm gives it, and a hostfile names others",
            where=str(resolved.origin("hostfile")),
            hint="leave the hostfile out, and say --nodes N",
        )
    if config.launcher not in (None, "slurm", "local"):
        raise DstrainError(
            f"a Slurm job starts its ranks with srun, not with the launcher {config.launcher}",
            where=str(resolved.origin("launcher")),
            hint="leave --launcher out; launch/slurm.sbatch is a script to change at will",
        )


def _refuse_what_does_not_fit(resolved: ResolvedConfig, ranks: int) -> None:
    """Now, and not when the job gets its turn."""
    from dstrain.planning.layout import choose_data_parallel

    config = resolved.config
    where = str(resolved.origin("pipeline"))
    choose_data_parallel(config.pipeline, config.data_parallel, ranks, where=where)


def _submit(resolved: ResolvedConfig, folder: RunFolder, text: str) -> str:
    """Write the script and what it trains, hand it to sbatch, and return the job's number. Raises DstrainError."""
    import shlex
    import shutil
    import subprocess

    from dstrain.api.preflight import not_writable
    from dstrain.files import write_atomically

    if shutil.which("sbatch") is None:
        raise DstrainError(
            "Slurm's sbatch is not in PATH",
            where="dstrain submit",
            hint="type it on a login node of the cluster; `dstrain run` trains here, or on the hosts of a --hostfile",
        )
    try:
        write_atomically(folder.config, resolved.to_yaml())
        write_atomically(folder.batch_script, text)
    except OSError as error:
        raise not_writable(error, folder) from error
    script = str(folder.batch_script)
    done = subprocess.run(["sbatch", "--parsable", script], capture_output=True, text=True, check=False)
    if done.returncode:
        raise DstrainError(
            f"sbatch takes no such job: {done.stderr.strip().removeprefix('sbatch: ')}",
            where=script,
            hint=f"mend the script and type: sbatch {shlex.quote(script)}",
        )
    return done.stdout.strip().split(";")[0]  # "number;cluster" where there are several clusters


def _tell(number: str, folder: RunFolder, job: Job) -> None:
    import shlex

    script, log = (shlex.quote(str(folder.path / name)) for name in ("launch.sbatch", f"slurm-{number}.log"))
    click.echo(f"job {number} is submitted: nodes {job.nodes}, ranks on each {job.tasks_per_node}")
    for what, line in (
        ("state", f"squeue --job {number}"),
        ("follow", f"tail -F {log}"),
        (
            "stop",
            f"scancel --batch --signal=TERM {number}    (it ends its step and saves; sbatch {script} goes on)",
        ),
        ("script", script),
    ):
        click.echo(f"{what:<8} {line}")
