"""A supervisor in a process of its own, and who floods it.

    python -m tests.support.control_flood supervisor WORLD_SIZE [OPEN_FILES]
    python -m tests.support.control_flood flood HOST PORT CONNECTIONS BYTES

The supervisor prints its address and key, polls as a real one does until its standard input ends, and prints what came
of it as JSON. With OPEN_FILES it may open no more files than these beside those that it has open.
"""

from __future__ import annotations

import json
import os
import resource
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dstrain.runs.protocol import ControlAddress, Hello, RankStatus
from dstrain.supervise.control_server import ControlServer
from dstrain.train.control_connection import ControlConnection, join

ROOT = Path(__file__).resolve().parents[2]
_POLL_SECONDS = 0.05


def supervisor(world_size: str, open_files: str = "") -> None:
    with ControlServer(int(world_size), only_here=True) as server:
        before = _resident_bytes()
        print(server.address(), server.key.hex(), flush=True)
        if open_files:
            most = len(os.listdir("/proc/self/fd")) + int(open_files)
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        longest, polls, begun, used = 0.0, 0, time.monotonic(), time.process_time()
        while not select.select([sys.stdin], [], [], _POLL_SECONDS)[0]:
            at = time.monotonic()
            server.poll()
            longest, polls = max(longest, time.monotonic() - at), polls + 1
        lost = [rank for rank, known in server.ranks.items() if known.lost_at is not None]
        told = {
            "ranks": len(server.ranks),
            "lost": lost,
            "longest_poll": longest,
            "polls": polls,
            "seconds": time.monotonic() - begun,
            "cpu_seconds": time.process_time() - used,
            "resident_bytes": _resident_bytes(),
            "grown_bytes": _resident_bytes() - before,
        }
    print(json.dumps(told), flush=True)


def _resident_bytes() -> int:
    """The most that this process has had so far."""
    # Not getrusage: its ru_maxrss counts the process that this one was forked from, exec or not.
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) * 1024


def flood(host: str, port: str, connections: str, size: str) -> None:
    """Open so many connections and keep them; send so many bytes over these, and over others where they are closed."""
    held: list[socket.socket] = []
    sent, made, wanted, content = 0, 0, int(size), b"[" * 65536
    while made < int(connections) or sent < wanted:
        try:
            held.append(socket.create_connection((host, int(port)), timeout=5))
        except OSError:
            continue
        made += 1
        held[-1].setblocking(False)
        if len(held) > int(connections):
            held.pop(0).close()
        if made > int(connections) // 2:  # the first half says nothing
            with suppress(OSError):
                while sent < wanted:
                    sent += held[-1].send(content)
    print(json.dumps({"connections": made, "bytes": sent}), flush=True)
    sys.stdin.read()


@dataclass
class FloodedSupervisor:
    address: ControlAddress
    key: bytes
    process: subprocess.Popen[str]
    told: dict[str, Any] = field(default_factory=dict)

    def join(self, rank: int) -> ControlConnection:
        status = RankStatus(rank, "n1", 100 + rank, "running")
        return join(self.address, self.key, Hello(self.address.launch, status))[0]

    def end(self) -> dict[str, Any]:
        """Stop it, and what it says of itself."""
        said, _ = self.process.communicate(timeout=60)
        assert self.process.returncode == 0
        result: dict[str, Any] = json.loads(said)
        return result


@contextmanager
def started(*arguments: object, limit: str = "") -> Iterator[subprocess.Popen[str]]:
    """One of the roles; ``limit``: what bash does before."""
    command = [sys.executable, "-m", "tests.support.control_flood", *map(str, arguments)]
    process = subprocess.Popen(
        ["bash", "-c", f'{limit or ":"}; exec "$@"', "bash", *command],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@contextmanager
def supervising(
    world_size: int, open_files: int | None = None, limit: str = ""
) -> Iterator[FloodedSupervisor]:
    with started(
        "supervisor", world_size, *(() if open_files is None else (open_files,)), limit=limit
    ) as process:
        assert process.stdout is not None
        address, key = process.stdout.readline().split()
        yield FloodedSupervisor(ControlAddress.parse(address), bytes.fromhex(key), process)


if __name__ == "__main__":
    {"supervisor": supervisor, "flood": flood}[sys.argv[1]](*sys.argv[2:])
