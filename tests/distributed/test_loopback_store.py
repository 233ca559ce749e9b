"""torch's store of a run on one host: where it listens, and that ranks meet in it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from dstrain.engine.loopback_store import init_method
from dstrain.launch.command import free_port

# Both ranks in one process group, then what rank 0 listens on: (address, port) of each socket.
RANK = """
import os, psutil, torch, torch.distributed as dist
from dstrain.engine.loopback_store import init_method
dist.init_process_group("gloo", init_method=init_method())
told = torch.tensor([dist.get_rank() + 1])
dist.all_reduce(told)
assert told.item() == 3
if dist.get_rank() == 0:
    for one in psutil.Process().net_connections("tcp"):
        if one.status == psutil.CONN_LISTEN:
            print(one.laddr.ip, one.laddr.port)
dist.barrier()
"""


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "localhost"])
def test_it_listens_there_alone(address: str) -> None:
    if address == "::1" and not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    port = free_port()
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC")},
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK],
            env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    outputs = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    listeners = [line.split() for line in outputs[0][0].splitlines()]
    assert {ip for ip, _ in listeners} <= {"127.0.0.1", "::1"}
    wanted = "127.0.0.1" if address == "localhost" else address
    assert [wanted, str(port)] in listeners


def test_when_it_is_used() -> None:
    assert init_method({"MASTER_ADDR": "127.0.0.1"}) == "dstrain-loopback://"
    assert init_method({"MASTER_ADDR": "n1"}) is None
    assert init_method({}) is None
    held_by_torchrun = {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    assert init_method(held_by_torchrun) is None
