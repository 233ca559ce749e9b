"""launch.sbatch: the batch script of a Slurm job that trains a run and requeues itself."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dstrain.errors import RESUMABLE, DstrainError
from dstrain.runs.run_folder import RunFolder

WARNING_SECONDS = 120
"""So long before a job's time is over, Slurm says so: time for the current step and for a checkpoint."""
_OF_A_JOB_NAME = re.compile(r"[^A-Za-z0-9._-]")


@dataclass(frozen=True)
class Job:
    """What a batch script asks for.

    Attributes:
        gpus: of each node; 0 where none are asked for.
        options: more of sbatch's own, as ``--time=04:00:00``. They stand behind ours, and win.
        directory: where the run starts: relative paths of its config count from there.
        trust: import the code that the run folder names, though it belongs to another user.
    """

    run_folder: Path
    nodes: int
    tasks_per_node: int
    gpus: int = 0
    options: Sequence[str] = ()
    python: str = field(default_factory=lambda: sys.executable)
    directory: Path = field(default_factory=Path.cwd)
    trust: bool = False


def batch_script(job: Job) -> str:
    """The text of the script. Raises DstrainError for an option that is none."""
    folder = RunFolder(job.run_folder)
    options = [
        f"--job-name={_OF_A_JOB_NAME.sub('-', folder.name)}",
        f"--nodes={job.nodes}",
        f"--ntasks-per-node={job.tasks_per_node}",
        *([f"--gpus-per-node={job.gpus}"] if job.gpus else []),
        f"--output={_quoted(folder.path)}/slurm-%j.log",
        "--open-mode=append",
        "--requeue",
        f"--signal=B:USR1@{WARNING_SECONDS}",
        *map(_checked, job.options),
    ]
    directives = "\n".join(f"#SBATCH {option}" for option in options)
    return _SCRIPT.format(
        directives=directives,
        script=shlex.quote(str(folder.batch_script)),
        directory=shlex.quote(str(job.directory.absolute())),
        python=shlex.quote(job.python),
        run=shlex.quote(str(folder.path)) + (" --trust" if job.trust else ""),
        resumable=RESUMABLE,
    )


def _quoted(path: Path) -> str:
    """As sbatch reads it: a % begins a pattern of its own, and a line end the next line."""
    text = str(path)
    if any(sign in text for sign in "\"'\\\n"):
        raise DstrainError(
            f"sbatch can't handle the path of the run folder: {text!r}",
            hint="use a --name and runs_dir without quotes, backslashes and newlines",
        )
    return '"' + text.replace("%", "%%") + '"'


def _checked(option: str) -> str:
    if not option.startswith("-") or "\n" in option:
        raise DstrainError(
            f"{option!r} is not an sbatch option",
            where="--sbatch",
            hint="for example --sbatch --time=04:00:00",
        )
    return option


_SCRIPT = """\
#!/bin/bash
{directives}

# Written by `dstrain submit`. It trains what config.yaml beside it says, from the newest checkpoint if there is one.
# It may be edited and submitted again: sbatch {script}

cd -- {directory} || exit 1

stopped_by=
stop() {{
    stopped_by=$1 interrupted=yes
    [ -z "$!" ] || kill -s "$1" "$!"
}}
trap 'stop USR1' USR1  # the time is nearly over
trap 'stop TERM' TERM  # cancelled or requeued

# dstrain takes the hosts of this job. Told to stop, it ends its step, saves, and leaves with exit code {resumable}.
{python} -m dstrain.cli.main resume {run} &
interrupted=yes
while [ "$interrupted" = yes ]; do
    interrupted=no
    wait "$!"  # a signal ends it early
    code=$?
done

# Its time is over, or it is preempted, of which Slurm tells the ranks alone. TERM says that somebody ends the job: who
# requeues it needs no help, and who cancels it wants none.
if [ "$code" = {resumable} ] && [ "$stopped_by" != TERM ]; then
    echo "the run continues when job $SLURM_JOB_ID is scheduled again"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""
