"""The command that starts the ranks: DeepSpeed's own launcher, spelled out so that a person can run it."""

from __future__ import annotations

import os
import random
import re
import shlex
import socket
import sys
from dataclasses import dataclass, field
from pathlib import Path

from dstrain.errors import DstrainError
from dstrain.launch.environment import check_environment, environment_text
from dstrain.launch.hosts import is_this_host
from dstrain.plan.layout import Host
from dstrain.plan.run_folder import RunFolder, write_atomically

WORKER_MODULE = "dstrain.train.worker"
# What DeepSpeed and pdsh hand to a remote shell without quotes.
_PLAIN_PATH = re.compile(r"[A-Za-z0-9_@+=:,./-]+")
# Below Linux's range for outgoing connections, so that none of those takes the port before the ranks do.
_PORTS = range(20000, 32768)


@dataclass(frozen=True)
class LaunchRequest:
    """All that the launch depends on.

    ``hosts`` is empty without a hostfile: this machine. ``device_ids`` are the GPUs to take on this machine
    (``Devices.ids``); empty means the first ones, and several hosts always take their first ones.
    ``directory`` is where the ranks start: relative paths of the run config count from there.
    """

    run_folder: Path
    hosts: tuple[Host, ...]
    processes_per_host: int
    accelerator: str
    master_addr: str
    master_port: int
    environment: dict[str, str]
    python: str = sys.executable
    device_ids: tuple[int, ...] = ()
    directory: Path = field(default_factory=Path.cwd)


def runs_here(hosts: tuple[Host, ...]) -> bool:
    """Whether this machine is the only one, and no ssh is needed."""
    return not hosts or (len(hosts) == 1 and is_this_host(hosts[0].name))


def deepspeed_command(request: LaunchRequest) -> list[str]:
    """The argv of DeepSpeed's launcher. Several hosts, or one that is not this one, are reached through pdsh.

    The module is named, not the ``deepspeed`` script: that may be missing in PATH, and its first line breaks
    where the path of the virtual environment holds a space or is longer than the kernel's limit.

    Raises:
        DstrainError: a host has too few slots, there are too few GPUs, or a path can't pass a remote shell.
    """
    launcher = [request.python, "-m", "deepspeed.launcher.runner"]
    if runs_here(request.hosts):
        # Without this, DeepSpeed takes /job/hostfile where a machine has one. /dev/null is its "no hostfile";
        # with a real one it would ask for ssh even to localhost.
        launcher += ["--hostfile", os.devnull, *_devices(request), "--master_addr", "127.0.0.1"]
    else:
        _check_remote(request)
        launcher += ["--hostfile", str(RunFolder(request.run_folder).hostfile), "--launcher", "pdsh"]
        # A single remote host would be run on this machine otherwise.
        launcher += ["--force_multi", "--master_addr", request.master_addr]
    launcher += ["--master_port", str(request.master_port), "--no_local_rank"]
    return [*launcher, "--module", WORKER_MODULE, str(RunFolder(request.run_folder).path)]


def write_launch_files(request: LaunchRequest) -> None:
    """Write launch.sh, ``environment`` and, for several hosts, ``hostfile`` into the run folder.

    Raises:
        DstrainError: see :func:`deepspeed_command`; a variable that can't travel; an unwritable folder.
    """
    folder = RunFolder(request.run_folder)
    remote = not runs_here(request.hosts)
    check_environment(request.environment, remote=remote)
    command = deepspeed_command(request)
    exported = dict(sorted(request.environment.items()))
    if remote:
        # An absolute path also keeps a ~/.deepspeed_env of another project out of the run.
        exported["DS_ENV_FILE"] = str(folder.environment)
    lines = [
        "#!/usr/bin/env bash",
        "# Starts this run: written by dstrain, works by hand from any folder.",
        "set -eu",
        f"cd -- {shlex.quote(str(request.directory.absolute()))}",
        *(f"export {name}={shlex.quote(value)}" for name, value in exported.items()),
        "exec " + shlex.join(command),
        "",
    ]
    try:
        write_atomically(folder.environment, environment_text(request.environment))
        if remote:
            hosts = [f"{host.name} slots={request.processes_per_host}\n" for host in request.hosts]
            write_atomically(folder.hostfile, "".join(hosts))
        else:
            folder.hostfile.unlink(missing_ok=True)
        write_atomically(folder.launch_script, "\n".join(lines))
        folder.launch_script.chmod(0o755)
    except OSError as error:
        raise DstrainError(
            f"the launch files can't be written: {error.strerror}.", where=str(folder.path)
        ) from error


def free_port() -> int:
    """A TCP port that nothing listens on here and that no outgoing connection is likely to take.

    Raises:
        DstrainError: none of 100 tries was free.
    """
    for port in random.sample(_PORTS, 100):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise DstrainError(
        f"no free TCP port was found from {_PORTS.start} to {_PORTS.stop - 1}.",
        hint="name one that the ranks may use",
    )


def _devices(request: LaunchRequest) -> list[str]:
    """--num_gpus, or --include where the user chose GPUs: --num_gpus would take 0, 1, ... whatever
    CUDA_VISIBLE_DEVICES says."""
    count = request.processes_per_host
    if request.hosts and request.hosts[0].slots < count:
        raise _too_few_slots(request.hosts[0], count)
    if request.accelerator != "cuda" or not request.device_ids:
        return ["--num_gpus", str(count)]
    if len(request.device_ids) < count:
        raise DstrainError(
            f"{count} processes need a GPU each, and {len(request.device_ids)} are visible.",
            hint=f"ask for at most {len(request.device_ids)} processes a host, or see CUDA_VISIBLE_DEVICES",
        )
    chosen = sorted(request.device_ids[:count])
    if chosen == list(range(count)):
        return ["--num_gpus", str(count)]
    return ["--include", "localhost:" + ",".join(map(str, chosen))]


def _check_remote(request: LaunchRequest) -> None:
    for host in request.hosts:
        if host.slots < request.processes_per_host:
            raise _too_few_slots(host, request.processes_per_host)
    if len(request.hosts) > 1 and (
        request.master_addr == "localhost" or request.master_addr.startswith(("127.", "::1"))
    ):
        raise DstrainError(
            f"the other hosts can't reach rank 0 at {request.master_addr}.",
            hint="give an address of the first host that the others reach",
            where="master_addr",
        )
    for what, path in (
        ("run folder", str(RunFolder(request.run_folder).path)),
        ("launch folder", str(request.directory.absolute())),
        ("python", request.python),
    ):
        if not _PLAIN_PATH.fullmatch(path):
            raise DstrainError(
                f"the path of the {what} would not survive the remote shell: {path!r}.",
                hint="use letters, digits and @ + = : , . _ / - only",
            )


def _too_few_slots(host: Host, count: int) -> DstrainError:
    return DstrainError(
        f"host {host.name} has {host.slots} slots, and {count} processes a host are asked for.",
        hint=f"ask for at most {host.slots} processes a host, or raise the host's slots",
    )
