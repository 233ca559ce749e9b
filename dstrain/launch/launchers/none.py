"""``launcher: none``: dstrain is started on each node, as Kubernetes does, and starts its ranks with torchrun."""

from __future__ import annotations

from dstrain.launch.launch_spec import NODE, LaunchSpec
from dstrain.launch.launchers.torchrun import agent


def command(request: LaunchSpec) -> list[str]:
    """The argv, with `NODE` where the number of the node belongs.

    torchrun on node 0 opens the port and waits ten minutes for the others, which may come in any order.
    """
    return agent(request, request.master_addr, node_rank=NODE, nodes=max(1, len(request.hosts)))
