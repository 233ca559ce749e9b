"""``run``: plans, launches and supervises a run, with restarts after failures."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from dstrain.api.events import SILENT, Events
from dstrain.api.follow import RunFollower
from dstrain.api.launch_attempt import launch, launch_spec
from dstrain.api.outcome import RunResult, result_of
from dstrain.api.planning import Planned, plan_for
from dstrain.api.preflight import (
    new_run_folder,
    node_of,
    refuse_elastic_alone,
    refuse_full_disk,
    refuse_other_training,
)
from dstrain.api.restart_policy import RestartLoop
from dstrain.config.loader import ResolvedConfig
from dstrain.diagnostics.quick_check import refuse_unfit_hosts
from dstrain.errors import DstrainError
from dstrain.launch.command import launch_command
from dstrain.runs.run_folder import RunFolder


@dataclass(frozen=True)
class Job:
    """A planned run and its folder.

    Attributes:
        resolved: the config.
        planned: the plan and the machines.
        folder: not necessarily made yet.
        node: with the launcher ``none``, the number of this node; None where it was not given.
    """

    resolved: ResolvedConfig
    planned: Planned
    folder: RunFolder
    node: int | None = None

    @property
    def for_every_node(self) -> bool:
        """Whether somebody types the command on every node, and this is none of them."""
        return self.planned.placement.launcher == "none" and self.node is None


def run(
    config: ResolvedConfig,
    *,
    resume: bool = False,
    node_rank: int | None = None,
    events: Events = SILENT,
) -> RunResult:
    """Train. Returns when all processes of the run have ended.

    In the main thread the first SIGINT, SIGTERM, SIGHUP or SIGUSR1 ends the current step, saves, and lets the run end
    in order (`RunResult.completed` is False then); a second one ends it at once.

    Args:
        config: from `load_config`. ``name`` names the run folder; without one it is made from date and model.
        resume: resume the run of that name.
        node_rank: with ``launcher: none``, which node this is, from 0 on.
        events: told of what happens.

    Raises:
        RunFailedError: the first rank that failed, its host and its reason.
        DstrainError: the run is refused; nothing has been started.
    """
    job = new_job(config, resume=resume, node_rank=node_rank, events=events)
    if job.for_every_node:
        raise DstrainError(
            "launcher: none requires the number of this node",
            where="node_rank",
            hint="node_rank=I, counted from 0",
        )
    return execute(job, events)


def new_job(
    resolved: ResolvedConfig,
    *,
    resume: bool = False,
    node_rank: int | None = None,
    events: Events = SILENT,
) -> Job:
    """Plan a run. Raises DstrainError where it is refused."""
    if resume and resolved.config.name is None:
        raise DstrainError(
            "--resume requires the name of the run",
            where="--resume",
            hint="add --name NAME, or use `dstrain resume RUN`",
        )
    node = node_of(resolved, node_rank)
    # Whichever node comes first makes the folder: the others find it.
    folder = RunFolder(new_run_folder(resolved, resume=resume or node_rank is not None).path, node or 0)
    planned = plan_for(resolved, events=events)
    events.planned(planned.plan)
    return Job(resolved, planned, folder, node)


def command_of(job: Job, events: Events = SILENT) -> str:
    """The shell command that starts the ranks. Nothing is started.

    Raises:
        DstrainError: what would refuse the run before its start.
    """
    _check(job, events)
    return shlex.join(launch_command(launch_spec(job.planned, job.folder)))


def execute(job: Job, events: Events = SILENT) -> RunResult:
    """Launch the plan and stay until it has ended; after a failure again, if that is wanted.

    Raises:
        RunFailedError: the first failing rank, its host and its reason.
        DstrainError: before anything is started: a checkpoint of another training, a full disk, unfit hosts.
    """
    planned, resolved, folder = job.planned, job.resolved, job.folder
    _check(job, events)
    spec = launch_spec(planned, folder)
    config = resolved.config
    refuse_unfit_hosts(spec, config.hostfile)
    restarts = RestartLoop(planned, resolved, folder, events)
    while True:
        events.started(folder.path, shlex.join(launch_command(spec)))
        follower = RunFollower(folder, events)
        outcome = launch(spec, planned, resolved, folder, follower.update)
        follower.update()
        try:
            result = result_of(outcome, folder, saves=config.saves)
        except DstrainError as error:
            if outcome.by_user:
                raise
            planned = restarts.next_attempt(error, trained=outcome.trained)
            spec = launch_spec(planned, folder)
        else:
            events.ended(result)
            return result


def _check(job: Job, events: Events) -> None:
    refuse_other_training(job.planned.plan, job.folder, events)
    refuse_full_disk(job.planned.plan, job.folder)
    refuse_elastic_alone(job.planned.placement, job.resolved)
