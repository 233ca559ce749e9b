"""Carry a plan out: fill the run folder, launch, watch, and tell the end."""

from __future__ import annotations

import fcntl
import json
import shlex
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.text import Text

from dstrain.checkpoint.identity import refuse_other, what_changes
from dstrain.checkpoint.manifest import newest_complete
from dstrain.cli.planning import Planned
from dstrain.config.loader import ResolvedConfig
from dstrain.errors import DstrainError
from dstrain.launch.command import LaunchRequest, deepspeed_command, free_port, runs_here, write_launch_files
from dstrain.launch.environment import default_environment
from dstrain.launch.supervisor import Outcome, supervise
from dstrain.plan.disk import check_disk
from dstrain.plan.plan import Plan
from dstrain.plan.run_folder import RunFolder, write_atomically, write_json
from dstrain.report.live import LiveLine

FAILED = 1


def new_run_folder(resolved: ResolvedConfig, *, resume: bool) -> RunFolder:
    """The folder of this run, not made yet. Raises DstrainError if there is one and it is not resumed."""
    config = resolved.config
    name = config.name
    if name is None:
        model = Path(config.model).name or "model"
        name = f"{time.strftime('%Y-%m-%d-%H%M%S')}-{model}"
    elif (
        not name
        or Path(name).name != name
        or name.startswith(".")
        or not name.isprintable()
        or len(name) > 100
    ):
        raise DstrainError(
            f"{name!r} is no name for a folder",
            where=str(resolved.origin("name")),
            hint="up to 100 letters and digits, no slash and no dot in front; --set runs_dir=FOLDER says where",
        )
    if Path(config.runs_dir).exists() and not Path(config.runs_dir).is_dir():
        raise DstrainError(
            f"{config.runs_dir} is a file, not a folder", where=str(resolved.origin("runs_dir"))
        )
    folder = RunFolder(Path(config.runs_dir) / name)
    if folder.path.exists() and not resume:
        raise DstrainError(
            f"the run folder {folder.path} exists",
            where=str(resolved.origin("name")),
            hint=f"--resume to go on with it, or another --name (`dstrain resume {folder.name}` keeps its config)",
        )
    return folder


def execute(
    planned: Planned, resolved: ResolvedConfig, folder: RunFolder, console: Console, *, dry_run: bool
) -> None:
    """Launch the plan in ``folder`` and stay until it has ended.

    Raises:
        DstrainError: before anything is started: a checkpoint of another training; at the end: the
            first failing rank, its host and its reason, with exit code 1 or the signal's.
    """
    newest = newest_complete(folder.checkpoints)
    if newest is not None:
        refuse_other(newest, planned.plan.identity)
        for line in what_changes(newest, planned.plan.identity):
            console.print(Text.assemble(("resume ", "bold"), line), soft_wrap=True)
    refuse_full_disk(planned.plan, folder)
    request = _launch_request(planned, folder)
    console.print(
        Text.assemble(("command  ", "bold"), shlex.join(deepspeed_command(request))), soft_wrap=True
    )
    if dry_run:
        return
    with LiveLine(folder, console, steps=planned.plan.run_config.steps) as live:
        launch(request, planned, resolved, folder, live.update)
    _tell_the_end(folder, console)


def execute_quietly(planned: Planned, resolved: ResolvedConfig, folder: RunFolder) -> None:
    """The same without a word. Raises DstrainError as `execute` does."""
    refuse_full_disk(planned.plan, folder)
    launch(_launch_request(planned, folder), planned, resolved, folder, lambda: None)


def refuse_full_disk(plan: Plan, folder: RunFolder) -> None:
    """Refuse a run whose checkpoints do not fit on its disk. Raises DstrainError."""
    there = next(path for path in (folder.path, *folder.path.parents) if path.exists())
    held = sum(path.stat().st_size for path in folder.checkpoints.rglob("*") if path.is_file())
    check_disk(
        needed=plan.disk_bytes,
        one=plan.checkpoint_bytes,
        free=shutil.disk_usage(there).free,
        held=held,
        where=str(folder.path),
    )


def launch(
    request: LaunchRequest,
    planned: Planned,
    resolved: ResolvedConfig,
    folder: RunFolder,
    on_tick: Callable[[], None],
) -> None:
    """Fill the run folder, start the ranks, and return when all have reached the end.

    Raises:
        DstrainError: the folder can't be written, or the run failed.
    """
    plan = planned.plan
    try:
        folder.logs.mkdir(parents=True, exist_ok=True)
        lock = folder.lock.open("w")
    except OSError as error:
        raise _not_writable(error, folder) from error
    with lock:
        try:  # released by the kernel when this process ends, however it ends
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DstrainError(
                "another dstrain is running this run folder",
                where=str(folder.path),
                hint="wait for it, stop it, or start a run under another --name",
            ) from None
        try:
            write_atomically(folder.config, resolved.to_yaml())
            write_json(folder.plan, plan.to_record())
            write_json(folder.deepspeed_config, plan.deepspeed)
            write_launch_files(request)
            folder.result.unlink(missing_ok=True)
        except OSError as error:
            raise _not_writable(error, folder) from error
        outcome = supervise(
            ["bash", str(folder.launch_script)],
            environment={},
            folder=folder,
            world_size=plan.layout.world_size,
            on_tick=on_tick,
        )
    if outcome.stopped_after is not None:
        raise DstrainError(
            f"stopped after step {outcome.stopped_after}, which is saved",
            hint=f"`dstrain resume {folder.path}` goes on from there",
            exit_code=outcome.exit_code,
        )
    if not outcome.ok:
        raise _failure(outcome, folder)


def _not_writable(error: OSError, folder: RunFolder) -> DstrainError:
    return DstrainError(
        f"the run folder can't be written: {error.strerror}",
        where=str(error.filename or folder.path),
        hint="--set runs_dir=FOLDER names another place",
    )


def _launch_request(planned: Planned, folder: RunFolder) -> LaunchRequest:
    layout = planned.plan.layout
    hosts = layout.hosts if planned.plan.config["hostfile"] else ()
    processes = layout.hosts[0].slots
    return LaunchRequest(
        run_folder=folder.path,
        hosts=hosts,
        processes_per_host=processes,
        accelerator=planned.plan.accelerator,
        master_addr=layout.hosts[0].name if hosts else "127.0.0.1",
        master_port=free_port(),
        environment=default_environment(planned.plan.accelerator, processes, runs_here(hosts)),
        device_ids=planned.devices.ids,
    )


def _failure(outcome: Outcome, folder: RunFolder) -> DstrainError:
    """The one cause, behind the last lines of the log that it stands in."""
    cause = outcome.cause
    if cause is None:
        return DstrainError(
            "the run failed", hint=f"see {folder.logs}", exit_code=outcome.exit_code or FAILED
        )
    who = f"rank {cause.rank} on {cause.host}: " if cause.rank is not None else ""
    tail = "".join(f"  | {line}\n" for line in cause.log_tail)
    log = folder.rank_log(cause.rank) if cause.rank is not None else folder.launcher_log
    resumable = newest_complete(folder.checkpoints)
    hint = (
        f"`dstrain resume {folder.path}` goes on from {resumable.name}"
        if resumable and str(resumable) not in cause.reason  # not from the one that was at fault
        else f"the logs: {folder.logs}"
    )
    # A rank's own message stands in its log behind "error: ", and says all; a traceback's end does not.
    told = "\n".join(cause.log_tail).endswith(f"error: {cause.reason}")
    what = "the run failed: " if told else f"the run failed. The end of {log}:\n{tail}"
    return DstrainError(
        f"{what}{who}{cause.reason}",
        hint=hint,
        # 2 means that nothing was started; a rank's own error ends with that code as well.
        exit_code=FAILED if outcome.exit_code == 2 else outcome.exit_code,
    )


def _tell_the_end(folder: RunFolder, console: Console) -> None:
    result = json.loads(folder.result.read_text(encoding="utf-8"))
    newest = newest_complete(folder.checkpoints)
    if result["held_out_loss"] is not None:
        console.print(Text.assemble(("held-out loss  ", "bold"), f"{result['held_out_loss']:.4f}"))
    if result["continuation"]:
        console.print(Text.assemble(("the model continues ", "bold"), repr(result["prompt"])))
        console.print(Text(result["continuation"], style="cyan"))
    rows = [
        ("run folder", folder.path),
        ("metrics", folder.metrics),
        ("checkpoint", newest),
        ("logs", folder.logs),
    ]
    for label, path in rows:
        console.print(Text.assemble((f"{label:<11}", "bold"), str(path)), soft_wrap=True)
