"""``dstrain submit``: writes a Slurm batch script for a run, and submits it."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

import click

from dstrain.cli.options import GroupedOptions, choices, given, layers, trust_option

if TYPE_CHECKING:
    from dstrain.launch.batch_script import Job
    from dstrain.runs.run_folder import RunFolder


@click.command("submit", cls=GroupedOptions)
@layers
@choices
@click.option("--gpus-per-node", type=click.IntRange(1), help="GPUs per node, with one rank each.")
@click.option("--tasks-per-node", type=click.IntRange(1), help="Ranks per node, on nodes without GPUs.")
@click.option(
    "--sbatch",
    "options",
    multiple=True,
    metavar="OPTION",
    help="Option for sbatch, e.g. --sbatch --time=04:00:00 or --sbatch --partition=gpu. Repeatable.",
)
@click.option(
    "--dry-run", is_flag=True, help="Show the batch script, without writing or submitting anything."
)
@click.option("--resume", is_flag=True, help="Resume the run with this --name.")
@trust_option
def command(
    recipe: str | None,
    config_file: str | None,
    settings: tuple[str, ...],
    gpus_per_node: int | None,
    tasks_per_node: int | None,
    options: tuple[str, ...],
    dry_run: bool,
    resume: bool,
    trust: bool,
    **flags: Any,
) -> None:
    """Write a Slurm batch script for a run, and submit it.

    The job plans and trains when Slurm starts it. Before its time limit it saves and requeues itself, and
    continues when it is scheduled again; likewise when it is preempted.
    """
    from dstrain.api.planning import load_config
    from dstrain.api.submitting import slurm_job, submit

    nodes = flags.pop("nodes") or 1
    job = slurm_job(
        load_config(config_file, recipe=recipe, settings=settings, flags=given(flags)),
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        tasks_per_node=tasks_per_node,
        options=options,
        resume=resume,
        trust=trust,
    )
    if dry_run:
        click.echo(job.script, nl=False)
        return
    number, submitted = submit(job)
    _show(number, submitted.folder, submitted.job)


def _show(number: str, folder: RunFolder, job: Job) -> None:
    script, log = (shlex.quote(str(folder.path / name)) for name in ("launch.sbatch", f"slurm-{number}.log"))
    click.echo(f"job {number} submitted: nodes {job.nodes}, ranks per node {job.tasks_per_node}")
    for what, line in (
        ("state", f"squeue --job {number}"),
        ("follow", f"tail -F {log}"),
        (
            "stop",
            f"scancel --batch --signal=TERM {number}    (finishes its step and saves; sbatch {script} continues)",
        ),
        ("script", script),
    ):
        click.echo(f"{what:<8} {line}")
