"""``run``: plans, launches and supervises a run, with restarts after failures."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from dstrain.api.events import SILENT, Events
from dstrain.api.folder_lock import locked, lost
from dstrain.api.following import RunFollower
from dstrain.api.hub_data import planned_commits
from dstrain.api.launch_attempt import fill_run_folder, launch, launch_spec
from dstrain.api.outcome import FAILED, RunResult, result_of
from dstrain.api.planning import Planned, plan_for
from dstrain.api.preflight import (
    claim,
    new_run_folder,
    node_of,
    refuse_elastic_alone,
    refuse_full_disk,
    refuse_other_training,
)
from dstrain.api.received import note_other_owners, note_owner
from dstrain.api.restart_policy import RestartLoop
from dstrain.config.loader import ResolvedConfig
from dstrain.diagnostics.host_checks import refuse_taken_port, refuse_unfit_hosts
from dstrain.errors import DstrainError, os_error_shown
from dstrain.launch.command import launch_command
from dstrain.launch.launch_spec import LaunchSpec
from dstrain.runs.run_folder import RunFolder


@dataclass(frozen=True)
class Job:
    """A planned run and its folder.

    Attributes:
        resolved: the config.
        planned: the plan and the machines.
        folder: not necessarily made yet.
        node: with the launcher ``none``, the number of this node; None where it was not given.
        new: whether the folder is this command's to make.
    """

    resolved: ResolvedConfig
    planned: Planned
    folder: RunFolder
    node: int | None = None
    new: bool = False

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
    note_owner(events, folder.path, folder.checkpoints)
    note_other_owners(resolved, events)
    planned = plan_for(resolved, events=events, commits=planned_commits(folder))
    events.planned(planned.plan)
    return Job(planned.settled(resolved), planned, folder, node, new=not resume and node is None)


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
    planned, resolved = job.planned, job.resolved
    _check(job, events)
    config = resolved.config
    wanted = launch_spec(planned, job.folder)
    if config.master_port is not None or wanted.launcher == "none":
        refuse_taken_port(wanted, str(resolved.origin("master_port")))
    refuse_unfit_hosts(wanted, config.hostfile, config.master_port)
    folder = _claimed(job)
    spec = launch_spec(planned, folder)
    try:
        return _until_the_end(planned, resolved, folder, spec, events)
    except OSError as error:  # 2 means that nothing was started
        raise os_error_shown(error, exit_code=FAILED) from error


def _until_the_end(
    planned: Planned, resolved: ResolvedConfig, folder: RunFolder, spec: LaunchSpec, events: Events
) -> RunResult:
    """Launch it, after failures again as the restarts say. Raises as `execute`; and OSError."""
    config = resolved.config
    restarts = RestartLoop(planned, resolved, folder, events)
    while True:
        events.started(folder.path, shlex.join(launch_command(spec)))
        follower = RunFollower(folder, events)
        outcome = launch(spec, planned, resolved, folder, follower.update, events)
        follower.update()
        try:
            result = result_of(outcome, folder, saves=config.saves)
        except DstrainError as error:
            if outcome.by_user:
                raise
            planned = restarts.next_attempt(error, trained=outcome.trained)
            if not folder.plan.exists():
                raise lost(folder) from error
            spec = launch_spec(planned, folder)
        else:
            events.ended(result)
            return result


def _claimed(job: Job) -> RunFolder:
    """The job's folder, which is made where the job is a new run's. Raises DstrainError."""
    return claim(job.folder, job.resolved) if job.new else job.folder


def _check(job: Job, events: Events) -> None:
    refuse_other_training(job.planned.plan, job.folder, events)
    refuse_full_disk(job.planned.plan, job.folder)
    refuse_elastic_alone(job.planned.placement, job.resolved)


def prepare_manual_launch(job: Job, events: Events = SILENT) -> tuple[RunFolder, list[str]]:
    """Fill the run folder; it, and the shell commands any of which starts the ranks.

    These ranks are not monitored: if one fails, the others may hang.

    Raises:
        DstrainError: the folder holds another run, or one that is still running; it can't be written; the disk is full.
    """
    folder = job.folder
    refuse_other_training(job.planned.plan, folder, events)
    refuse_full_disk(job.planned.plan, folder)
    folder = _claimed(job)
    spec = launch_spec(job.planned, folder)
    with locked(folder, job.resolved.config.access):
        fill_run_folder(spec, job.planned, job.resolved, folder, events)
    which = [str(folder.node)] if spec.launcher == "none" else []
    ways = [["bash", str(folder.launch_script), *which]]
    if spec.launcher == "pdsh":
        alone = ["--force_multi"] if len(spec.hosts) == 1 else []
        address = ["--master_addr", spec.master_addr] if job.resolved.config.master_addr else []
        place = ["--hostfile", str(folder.hostfile), *alone, *address]
        ways.append(["deepspeed", *place, "--module", *spec.worker])
    return folder, [shlex.join(way) for way in ways]


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
