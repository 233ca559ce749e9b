"""What a launch depends on, for any launcher."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

from dstrain.errors import DstrainError
from dstrain.launch.hosts import is_this_host
from dstrain.planning.layout import Host
from dstrain.runs.run_folder import RunFolder
from dstrain.runs.this_machine import is_loopback

CONTROL_ADDRESS = "__CONTROL_ADDRESS__"
"""Stands in an argv where the supervisor's address belongs: launch.sh has the variable there."""
NODE = "__NODE__"
"""Stands in an argv where the number of the node belongs: launch.sh has the variable `NODE_RANK` there."""
WORKER_MODULE = "dstrain.train.worker"
_PLAIN_PATH = re.compile(r"[A-Za-z0-9_@+=:,./-]+")


@dataclass(frozen=True)
class LaunchSpec:
    """All that the launch depends on.

    ``launcher`` is a name of `dstrain.launch.launchers.LAUNCHERS`. ``hosts`` is empty where this machine is
    the only one and nobody named it. ``device_ids`` are the GPUs to take on this machine (``Devices.ids``); empty means
    the first ones, and several hosts always take their first ones. ``directory`` is where the ranks start: relative
    paths of the run config count from there. ``node`` is this machine's number among the hosts, for the launcher
    ``none``.
    """

    run_folder: Path
    hosts: tuple[Host, ...]
    processes_per_host: int
    accelerator: str
    master_addr: str
    master_port: int
    environment: dict[str, str]
    launcher: str = "local"
    python: str = field(default_factory=lambda: sys.executable)
    device_ids: tuple[int, ...] = ()
    directory: Path = field(default_factory=Path.cwd)
    node: int = 0

    @property
    def worker(self) -> list[str]:
        """Module and its one argument: DeepSpeed's launcher eats options."""
        return [WORKER_MODULE, str(RunFolder(self.run_folder).path)]

    @property
    def world_size(self) -> int:
        return self.processes_per_host * max(1, len(self.hosts))

    @property
    def runs_here(self) -> bool:
        """Whether this machine is the only one."""
        return runs_here(self.hosts)

    @property
    def ranks(self) -> range:
        """The ranks that the launcher starts: of all hosts, or with ``none`` of this node alone."""
        if self.launcher != "none":
            return range(self.world_size)
        first = self.node * self.processes_per_host
        return range(first, first + self.processes_per_host)

    @property
    def host_of_rank(self) -> tuple[str, ...]:
        """The name of each rank's host, by rank: they are numbered host after host. Empty where the hosts have no
        names: this machine alone, and with ``none``, whose nodes are known by their numbers."""
        if self.launcher == "none":
            return ()
        return tuple(host.name for host in self.hosts for _ in range(self.processes_per_host))

    @property
    def over_ssh(self) -> bool:
        """Whether other hosts are gone to with ssh: what starts the ranks there knows nothing of this shell."""
        return not self.runs_here and self.launcher not in ("slurm", "none")

    @property
    def ssh_hosts(self) -> tuple[Host, ...]:
        """The hosts that must answer to ssh."""
        return self.hosts if self.over_ssh else ()

    @property
    def may_terminate(self) -> bool:
        """Whether SIGTERM may be sent to the launcher. DeepSpeed's launcher of several hosts would end every process
        on them that bears its command's name, ours or not."""
        return not self.over_ssh or self.launcher == "torchrun"


def runs_here(hosts: tuple[Host, ...]) -> bool:
    """Whether this machine is the only one, and no ssh is needed."""
    return not hosts or (len(hosts) == 1 and is_this_host(hosts[0].name))


def check_slots(request: LaunchSpec) -> None:
    """Raises DstrainError where a host has fewer slots than processes."""
    for host in request.hosts:
        if host.slots < request.processes_per_host:
            count = request.processes_per_host
            raise DstrainError(
                f"host {host.name} has {host.slots} slots, but {count} processes per host were requested",
                hint=f"request at most {host.slots} processes per host, or raise the host's slots",
            )


def refuse_this_host_alone(request: LaunchSpec) -> None:
    """For a launcher that starts ranks over ssh. Raises DstrainError where there is no other machine to go to."""
    if request.runs_here:
        raise DstrainError(
            f"--launcher {request.launcher} goes to other machines over ssh, and this one is the only one",
            where="--launcher",
            hint="remove --launcher, or name other machines in a --hostfile",
        )


def check_remote(request: LaunchSpec) -> None:
    """Refuse what does not reach other hosts. Raises DstrainError."""
    check_slots(request)
    if len(request.hosts) > 1 and is_loopback(request.master_addr):
        raise DstrainError(
            f"the other hosts can't reach rank 0 at {request.master_addr}",
            hint="set --master-addr to an address of the first host that the others can reach",
            where="master_addr",
        )
    for what, path in (
        ("run folder", str(RunFolder(request.run_folder).path)),
        ("launch folder", str(request.directory.absolute())),
        ("python", request.python),
    ):
        if not is_plain(path):
            raise DstrainError(
                f"the path of the {what} would not survive the remote shell: {path!r}",
                hint="use only letters, digits and @ + = : , . _ / -",
            )


def is_plain(path: str) -> bool:
    """Whether launchers can hand this path to a remote shell, which they do without quotes."""
    return _PLAIN_PATH.fullmatch(path) is not None
