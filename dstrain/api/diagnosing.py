"""``doctor``: checks the machines of a run and the network between them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from dstrain.api.events import SILENT, Events, progress_to
from dstrain.diagnostics.diagnosis import FAILED, Check
from dstrain.diagnostics.host_checks import examine_hosts, examine_this_machine
from dstrain.launch.environment import default_environment
from dstrain.launch.hosts import read_hostfile
from dstrain.launch.launch_spec import runs_here


@dataclass(frozen=True)
class DoctorResult:
    """What was found, in the order in which it was looked at."""

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing would stop a run."""
        return not any(check.status == FAILED for check in self.checks)


def doctor(
    hostfile: str | PathLike[str] | None = None,
    *,
    runs_dir: str | PathLike[str] = "runs",
    quick: bool = False,
    events: Events = SILENT,
) -> DoctorResult:
    """Look at logins, versions, devices, memory, disks, clocks, names, ports, and the network between the hosts.

    Args:
        hostfile: the machines, ``NAME slots=N`` lines; without one, this machine.
        runs_dir: where the run folders will lie.
        quick: without the real all-reduce and send, which need torch.
        events: hears how long the exchange has lasted, as notes of the topic ``progress``.

    Raises:
        DstrainError: the hostfile can't be read.
    """
    hosts = read_hostfile(str(hostfile)) if hostfile is not None else ()
    alone = runs_here(hosts)
    accelerator = os.environ.get("DS_ACCELERATOR", "")
    environment = default_environment(accelerator or "cuda", 1, alone, hosts=[host.name for host in hosts])
    if not accelerator:
        del environment["DS_ACCELERATOR"]  # each host says what it has

    say = progress_to(events)
    if alone:
        slots = sum(host.slots for host in hosts)
        checks = examine_this_machine(
            environment=environment, runs=Path(runs_dir), slots=slots, thorough=not quick, say=say
        )
    else:
        checks = examine_hosts(
            hosts, environment=environment, runs=Path(runs_dir), thorough=not quick, say=say
        )
    return DoctorResult(tuple(checks))
