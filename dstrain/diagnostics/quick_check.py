"""The quick checks before a run on several hosts."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

from dstrain.diagnostics.diagnosis import FAILED, Check
from dstrain.diagnostics.host_checks import examine_hosts
from dstrain.errors import DstrainError
from dstrain.launch.hosts import is_this_host, numbered_hosts
from dstrain.launch.launch_spec import LaunchSpec

# Shown one by one; a mistake that all hosts share is one mistake.
_SHOWN = 8


def refuse_unfit_hosts(request: LaunchSpec, hostfile: str | None) -> None:
    """Look at the hosts that are started over ssh, all at once; nothing where there are none.

    Raises:
        DstrainError: some can't take part: which, why, and how to fix it. Within 15 s for hosts that are silent.
    """
    if not request.ssh_hosts:
        return
    if request.launcher == "pdsh" and shutil.which("pdsh") is None:
        raise DstrainError(
            "pdsh, which starts the ranks on other hosts, is not installed here",
            where="--launcher",
            hint="install it (Debian: apt-get install pdsh), or see `dstrain run --help` for other launchers",
        )
    lines = {host.name: (host, line) for host, line in numbered_hosts(hostfile).items()} if hostfile else {}
    # With all slots that the hostfile gives it, though the run may use fewer: they are said to be there.
    hosts = [lines[host.name][0] if host.name in lines else host for host in request.ssh_hosts]
    checks = examine_hosts(
        hosts,
        environment=request.environment,
        runs=Path(request.run_folder).parent,
        python=request.python,
        thorough=False,
        # mpirun starts what belongs to its own machine by itself; pdsh logs in here as well.
        here_without_ssh=is_this_host if request.launcher == "openmpi" else lambda host: False,
    )
    failed = [check for check in checks if check.status == FAILED]
    if not failed:
        return
    first = failed[0].host
    look = f"; `dstrain doctor --hostfile {shlex.quote(hostfile)}` checks everything" if hostfile else ""
    raise DstrainError(
        _describe(failed, len(hosts)),
        hint=f"fix this, or remove the host{look}",
        where=f"{hostfile}:{lines[first][1]}" if first in lines else hostfile,
    )


def _describe(failed: list[Check], number: int) -> str:
    names = dict.fromkeys(check.host for check in failed)
    can = f"{len(names)} of {number} hosts can't take part in this run"
    told = [
        f"  {check.host}: {check.check}: {check.message}\n    fix: {check.fix}" for check in failed[:_SHOWN]
    ]
    more = [f"  and {len(failed) - _SHOWN} more"] if len(failed) > _SHOWN else []
    return "\n".join([can, *told, *more])
