"""After a failure: whether the run is restarted, how long to wait before, and on which hosts."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

from dstrain.api.events import Events
from dstrain.api.planning import Planned
from dstrain.config.loader import ResolvedConfig, override
from dstrain.errors import RESUMABLE, DstrainError
from dstrain.launch.launch_spec import runs_here
from dstrain.launch.ssh_reachability import silent_hosts
from dstrain.runs.checkpoint.identity import refuse_other
from dstrain.runs.checkpoint.manifest import newest_complete, step_of
from dstrain.runs.run_folder import RunFolder, last_step
from dstrain.stop_signals import StoppedError, raised


class RestartLoop:
    """Decides after each failure of one run, and waits until it can go on.

    Args:
        planned: as the user wants it, on all hosts.
    """

    def __init__(self, planned: Planned, resolved: ResolvedConfig, folder: RunFolder, events: Events) -> None:
        self._planned, self._resolved = planned, resolved
        self._folder, self._events = folder, events
        self._restarts = Restarts(resolved.config.restarts)

    def next_attempt(self, error: DstrainError, *, trained: bool) -> Planned:
        """What to launch now; returns when it can be launched. Raises ``error`` where the run is given up, and
        DstrainError where it is told to end meanwhile.

        ``trained``: the launch that failed came as far as to train. Otherwise the metrics are those of one before.
        """
        step, saved = last_step(self._folder.metrics) if trained else 0, _saved_step(self._folder)
        decision = self._restarts.after_failure(step=step, saved=saved)
        if isinstance(decision, GiveUp):
            if decision.reason:
                self._events.note(f"no: {decision.reason}", "restart")
            raise error
        self._events.note(error.message, "failed")
        self._events.note(f"{decision.number} of {decision.most} in {decision.seconds:.0f} s", "restart")
        try:
            with raised():
                time.sleep(decision.seconds)
                return self._when_hosts_answer(decision.seconds)
        except (KeyboardInterrupt, StoppedError):
            raise self._stopped() from None

    def _stopped(self) -> DstrainError:
        """For a run that is told to end while none of its ranks runs."""
        newest = newest_complete(self._folder.checkpoints)
        resume = f"`dstrain resume {self._folder.path}`"
        return DstrainError(
            "stopped while waiting to restart",
            where=str(self._folder.path),
            hint=f"{resume} continues from {newest.name}" if newest else f"{resume} starts again from step 0",
            exit_code=RESUMABLE if newest else 1,
        )

    def _when_hosts_answer(self, seconds: float) -> Planned:
        """Those of the plan; or, if the run is elastic, enough others. They are asked again after ``seconds`` each."""
        told = ""
        used = {host.name for host in self._planned.plan.layout.hosts}
        while used & (silent := self._silent_hosts()).keys():
            now = "; ".join(f"{host}: {why}" for host, why in sorted(silent.items()))
            if self._resolved.config.elastic:
                try:
                    smaller = fewer_replicas(self._planned, self._resolved, silent, self._folder)
                except DstrainError as error:
                    now += f" ({error.message})"
                else:
                    self._events.note(f"{_describe(smaller)}, without {now}", "elastic")
                    return smaller
            if now != told:
                self._events.note(f"for {now}", "waiting")
                told = now
            time.sleep(seconds)
        return self._planned

    def _silent_hosts(self) -> dict[str, str]:
        placement = self._planned.placement
        if not placement.hosts or placement.launcher in ("slurm", "none"):
            return {}  # Slurm's hosts need not let anybody in over ssh; with `none` they have no names
        return silent_hosts(
            placement.hosts if self._resolved.config.elastic else self._planned.plan.layout.hosts
        )


def fewer_replicas(
    planned: Planned, resolved: ResolvedConfig, silent: Mapping[str, str], folder: RunFolder
) -> Planned:
    """The same training on the hosts that are left: as many replicas as they hold; stages and global batch stay.

    Raises:
        DstrainError: they hold no replica, or the global batch can't be shared by as many as they hold or fewer.
    """
    placement, full = planned.placement, planned.plan.layout
    hosts = tuple(host for host in placement.hosts if host.name not in silent)
    held = sum(host.slots for host in hosts) // full.pipeline
    refusal = DstrainError(
        f"the remaining hosts have too few slots for the {full.pipeline} stages of a replica"
    )
    # An address that the user gave for the first host is not that of another one.
    changes = {} if hosts[:1] == placement.hosts[:1] else {"master_addr": None}
    for replicas in range(min(held, full.data_parallel), 0, -1):
        try:
            plan = planned.make(override(resolved, {**changes, "data_parallel": replicas}), hosts)
            newest = newest_complete(folder.checkpoints)
            if newest is not None:
                refuse_other(newest, plan.identity)
        except DstrainError as error:
            refusal = error
            continue
        launcher = (
            "local"
            if runs_here(plan.layout.hosts) and resolved.config.launcher is None
            else placement.launcher
        )
        return replace(planned, plan=plan, placement=replace(placement, hosts=hosts, launcher=launcher))
    raise refusal


def _describe(planned: Planned) -> str:
    layout = planned.plan.layout
    return f"on {', '.join(host.name for host in layout.hosts)}: {planned.plan.batch.describe()}"


def _saved_step(folder: RunFolder) -> int:
    newest = newest_complete(folder.checkpoints)
    return step_of(newest) if newest is not None else 0


_FIRST_SECONDS, _MOST_SECONDS = 5.0, 300.0


@dataclass(frozen=True)
class Again:
    """Start again after ``seconds``; ``number`` of ``most`` restarts."""

    number: int
    most: int
    seconds: float


@dataclass(frozen=True)
class GiveUp:
    """Do not, and why. ``reason`` is empty where no restart was asked for."""

    reason: str


class Restarts:
    """Asked after each failure.

    The wait doubles from restart to restart, and is reset by progress: a machine that comes back needs
    time, and a run that fails now and then over weeks should not wait longer each time. The number of restarts is
    that of those in a row without a new checkpoint.

    Args:
        most: how many in a row.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._in_a_row = 0
        self._saved: int | None = None
        self._failed_at: int | None = None

    def after_failure(self, *, step: int, saved: int) -> Again | GiveUp:
        """What to do now.

        Args:
            step: the last step that was trained; 0 where the launch that failed has trained none.
            saved: the step of the newest complete checkpoint; 0 where there is none.
        """
        if not self._most:
            return GiveUp("")
        progress = self._saved is not None and saved > self._saved
        if progress:
            self._in_a_row = 0
        elif self._in_a_row and step == self._failed_at:
            where = f"after step {step}" if step else "before the first step"
            return GiveUp(f"it failed again {where}, and no checkpoint was made in between")
        self._saved, self._failed_at = saved, step
        if self._in_a_row == self._most:
            return GiveUp(f"it was restarted {self._most} times without a new checkpoint")
        self._in_a_row += 1
        seconds = min(_FIRST_SECONDS * 2 ** (self._in_a_row - 1), _MOST_SECONDS)
        return Again(self._in_a_row, self._most, seconds)
