"""The command that starts the ranks, written to launch.sh so that a person can run it."""

from __future__ import annotations

import random
import shlex

from dstrain.errors import DstrainError
from dstrain.files import make_executable, write_atomically
from dstrain.launch.environment import check_environment, environment_text, forgetting, start_folder
from dstrain.launch.launch_spec import CONTROL_ADDRESS, NODE, LaunchSpec
from dstrain.launch.launchers import LAUNCHERS
from dstrain.launch.launchers.openmpi import IN_QUOTES
from dstrain.runs.protocol import ADDRESS
from dstrain.runs.run_folder import NODE_RANK, QUOTED, RunFolder, make_open_to
from dstrain.runs.this_machine import listening_socket

_TRAVELLING = "DSTRAIN_ENV_FILE"
# Below Linux's range for outgoing connections, so that none of those takes the port before the ranks do.
_PORTS = range(20000, 32768)
USUAL_PORT = 29500
"""torch's own default, where nobody can ask all hosts for a free one."""


def launch_command(request: LaunchSpec) -> list[str]:
    """The argv of the request's launcher. Raises DstrainError where it can't start it."""
    return LAUNCHERS[request.launcher].command(request)


def write_launch_files(request: LaunchSpec) -> None:
    """Write launch.sh, ``environment`` and, for several hosts, ``hostfile`` into the run folder.

    Raises:
        DstrainError: see :func:`launch_command`; a variable that can't travel; an unwritable folder.
    """
    folder = RunFolder(request.run_folder)
    remote = request.over_ssh
    check_environment(request.environment, remote=remote)
    command = launch_command(request)
    exported = dict(sorted((request.environment | _rendezvous(request)).items()))
    lines = [
        "#!/usr/bin/env bash",
        "# Starts this run: written by dstrain; can be run manually from any folder.",
        "set -eu",
        f"cd -- {shlex.quote(start_folder(request.directory))}",
        forgetting(remote=remote),
        *(f"export {name}={shlex.quote(value)}" for name, value in exported.items()),
        *_environment_file(folder, remote),
        *_node(request),
        # A word with it is in single quotes: these end, the variable stands in double ones, and they begin anew.
        "exec "
        + shlex.join(command)
        .replace(CONTROL_ADDRESS, f"'\"${{{ADDRESS}:-}}\"'")
        .replace(NODE, f'"${{{NODE_RANK}}}"'),
        "",
    ]
    try:
        make_open_to(folder.path, "private")
        write_atomically(folder.environment, environment_text(_travelling(request)), private=True)
        if remote:
            hosts = [f"{host.name} slots={request.processes_per_host}\n" for host in request.hosts]
            write_atomically(folder.hostfile, "".join(hosts))
        else:
            folder.hostfile.unlink(missing_ok=True)
        write_atomically(folder.launch_script, "\n".join(lines))
        make_executable(folder.launch_script)
    except OSError as error:
        raise DstrainError(
            f"the launch files can't be written: {error.strerror}",
            where=str(error.filename or folder.path),
            hint="choose another folder with --set runs_dir=FOLDER",
        ) from error


def supervised_environment(request: LaunchSpec, control: str) -> dict[str, str]:
    """What the supervisor sets for launch.sh: where the ranks find it. It stands in no file of the run that a
    person would start again manually. Raises DstrainError where the file for other hosts can't be written."""
    told = {ADDRESS: control, NODE_RANK: str(request.node)}
    if request.over_ssh:
        travelling = RunFolder(request.run_folder).supervised_environment
        try:
            write_atomically(travelling, environment_text(_travelling(request) | told), private=True)
        except OSError as error:
            raise DstrainError(f"it can't be written: {error.strerror}", where=str(travelling)) from error
        told[_TRAVELLING] = str(travelling)
    return told


def _travelling(request: LaunchSpec) -> dict[str, str]:
    """What is carried to other hosts. Open MPI's ranks learn their number from it, and the meeting place from us; no
    shell takes the quotes away that DeepSpeed puts around some values."""
    if request.launcher != "openmpi":
        return request.environment
    quoted = {
        QUOTED: ",".join(sorted(n for n, value in request.environment.items() if IN_QUOTES.search(value)))
    }
    return request.environment | _rendezvous(request) | (quoted if quoted[QUOTED] else {})


def _rendezvous(request: LaunchSpec) -> dict[str, str]:
    return {"MASTER_ADDR": request.master_addr, "MASTER_PORT": str(request.master_port)}


def _environment_file(folder: RunFolder, remote: bool) -> list[str]:
    """What DeepSpeed carries to other hosts. An absolute path also keeps a ~/.deepspeed_env of another project out."""
    if not remote:
        return []
    return [f'export DS_ENV_FILE="${{{_TRAVELLING}:-{folder.environment}}}"']


def _node(request: LaunchSpec) -> list[str]:
    """launch.sh is the same on every node, and is told which one it is."""
    if request.launcher != "none":
        return []
    return [
        f': "${{{NODE_RANK}:=${{1:?which node is this, from 0 on? bash launch.sh NUMBER}}}}"',
        f"export {NODE_RANK}",
    ]


def free_port() -> int:
    """A TCP port that nothing listens on here and that no outgoing connection is likely to take.

    Raises:
        DstrainError: none of 100 tries was free.
    """
    for port in random.sample(_PORTS, 100):
        try:
            listening_socket(port).close()
        except OSError:
            continue
        return port
    raise DstrainError(
        f"no free TCP port was found from {_PORTS.start} to {_PORTS.stop - 1}.",
        hint="set --master-port to one that the ranks may use",
    )
