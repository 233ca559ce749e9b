"""torchrun: on this machine, or one agent per host started by pdsh."""

from __future__ import annotations

import re
import shlex
import shutil

from dstrain.errors import DstrainError
from dstrain.launch.environment import start_folder
from dstrain.launch.launch_spec import CONTROL_ADDRESS, LaunchSpec, check_remote, check_slots
from dstrain.launch.launchers import output
from dstrain.planning.layout import STORE_PORT
from dstrain.runs.protocol import ADDRESS

_KILLED = re.compile(output.HOST_PREFIX + r".*failed \(exitcode: -(?P<signal>\d+)\) local_rank: ")
# A file that has no name any more: the kernel removes it with the agent, however that ends.
_FILE = "/proc/self/fd/3"
# Without the variable the agent opens a store for the ranks, on all addresses.
_IN_A_FILE = (
    f'f=$(mktemp) && exec 3<>"$f" && rm "$f" && export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 {STORE_PORT}={{port}}'
    ' && exec "$@"'
)


def command(request: LaunchSpec) -> list[str]:
    """The argv: torchrun here, or pdsh, which starts one on each host.

    The world has a fixed size: stages can't be taken away. torchrun's own restarts are off, since a pipeline that
    lost a rank starts again as a whole (``--restarts``).

    Raises:
        DstrainError: something would not reach the other hosts as it is; pdsh is missing.
    """
    if request.runs_here:
        check_slots(request)
        return agent(request, "127.0.0.1", node_rank="0", nodes=1)
    check_remote(request)
    if shutil.which("pdsh") is None:
        raise DstrainError(
            "pdsh, which starts torchrun on each host, is not installed here",
            where="--launcher",
            hint="install it (Debian: apt-get install pdsh), or start launch.sh's command on each host manually",
        )
    # pdsh puts the number of the host, from 0 in the order of -w, in place of %n.
    started = shlex.join(agent(request, request.master_addr, node_rank="%n", nodes=len(request.hosts)))
    exported = "".join(
        f"export {name}={shlex.quote(value)}; " for name, value in sorted(request.environment.items())
    )
    exported += f"export {ADDRESS}={CONTROL_ADDRESS}; "
    names = ",".join(host.name for host in request.hosts)
    place = shlex.quote(start_folder(request.directory))
    return ["pdsh", "-S", "-R", "ssh", "-f", "1024", "-w", names, f"{exported}cd {place} && exec {started}"]


def agent(request: LaunchSpec, master: str, *, node_rank: str, nodes: int) -> list[str]:
    """torchrun for the ranks of one node. ``master``: where node 0 is reached.

    The agents of several nodes meet in a store that node 0 opens on all its addresses. A single one keeps it in a
    file, and its ranks meet on the loopback interface (`engine.loopback_store`).
    """
    several = [f"--node-rank={node_rank}", f"--master-addr={master}", f"--master-port={request.master_port}"]
    single = [
        "--rdzv-backend=c10d",
        "--rdzv-conf=store_type=file",
        f"--rdzv-endpoint={_FILE}",
        "--local-addr=127.0.0.1",
    ]
    return [
        *([] if nodes > 1 else ["sh", "-c", _IN_A_FILE.format(port=request.master_port), "sh"]),
        *(request.python, "-m", "torch.distributed.run"),
        *(f"--nnodes={nodes}", f"--nproc-per-node={request.processes_per_host}", "--max-restarts=0"),
        *(several if nodes > 1 else single),
        *("--module", *request.worker),
    ]


def killed_rank(line: str) -> output.KilledRank | None:
    """The rank that torchrun's agent reports as killed in a line of its output."""
    return output.killed_rank(_KILLED, line)
