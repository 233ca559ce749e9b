"""Carry a plan out: launch it, again after a failure if that is wanted, and tell the end."""

from __future__ import annotations

import shlex

from rich.console import Console
from rich.text import Text

from dstrain.api.launch_attempt import launch, launch_spec
from dstrain.api.planning import Planned
from dstrain.api.preflight import refuse_elastic_alone, refuse_full_disk, refuse_other_training
from dstrain.api.restart_policy import RestartLoop
from dstrain.api.run_summary import error_of, tell_the_end
from dstrain.config.loader import ResolvedConfig
from dstrain.diagnostics.quick_check import refuse_unfit_hosts
from dstrain.launch.command import launch_command
from dstrain.report.live import LiveLine
from dstrain.runs.run_folder import RunFolder


def execute(
    planned: Planned, resolved: ResolvedConfig, folder: RunFolder, console: Console, *, dry_run: bool
) -> None:
    """Launch the plan in ``folder`` and stay until it has ended; after a failure again, if that is wanted.

    Raises:
        DstrainError: before anything is started: a checkpoint of another training; at the end: the
            first failing rank, its host and its reason, with exit code 1 or the signal's.
    """
    refuse_other_training(planned.plan, folder, console)
    refuse_full_disk(planned.plan, folder)
    refuse_elastic_alone(planned.site, resolved)
    request = launch_spec(planned, folder)
    console.print(Text.assemble(("command  ", "bold"), shlex.join(launch_command(request))), soft_wrap=True)
    if dry_run:
        return
    config = resolved.config
    refuse_unfit_hosts(request, config.hostfile)
    restarting = RestartLoop(planned, resolved, folder, console)
    while True:
        with LiveLine(folder, console, steps=config.steps) as live:
            outcome = launch(request, planned, resolved, folder, live.update)
        if outcome.ok:
            return tell_the_end(folder, console) if folder.node == 0 else None
        error = error_of(outcome, folder, saves=config.saves)
        if outcome.by_user or outcome.stopped_after is not None:
            raise error
        planned = restarting.next_attempt(error, trained=outcome.trained)
        request = launch_spec(planned, folder)


def execute_quietly(planned: Planned, resolved: ResolvedConfig, folder: RunFolder) -> None:
    """The same without a word, and once. Raises DstrainError as `execute` does."""
    refuse_full_disk(planned.plan, folder)
    outcome = launch(launch_spec(planned, folder), planned, resolved, folder, lambda: None)
    if not outcome.ok:
        raise error_of(outcome, folder, saves=resolved.config.saves)
