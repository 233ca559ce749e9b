"""A run on two hosts without torch: supervisor, guard, pdsh and ssh, the ranks' connections are the real ones;
the launcher and the ranks are small, and behave like DeepSpeed's and like ranks that wait for each other.

    python -m tests.support.cluster.small_run command FOLDER STEPS HANG_SECONDS

starts ``runner`` on this host, which starts a ``node`` on n1 and n2, each of which starts ``rank`` twice. A step takes
0.1 s. One run at a time: a port is fixed.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, replace

from dstrain.runs.control_key import KEY, find_key
from dstrain.runs.protocol import ADDRESS, RankState, RankStatus
from dstrain.runs.run_folder import RunFolder
from dstrain.supervise.control_server import ControlServer
from dstrain.supervise.supervisor import supervise
from dstrain.train.control_client import ControlClient
from tests.support.cluster.plain_path import plain_python

_HOSTS = ("n1", "n2")
_RANKS = 2  # a host
_PORT = 29400


def argv(role: str, *arguments: str) -> list[str]:
    return [plain_python(), "-m", "tests.support.cluster.small_run", role, *arguments]


def command(folder: str, steps: str, hang_seconds: str) -> int:
    """Supervise a run, print its outcome as JSON, and return its exit code."""
    control = ControlServer(len(_HOSTS) * _RANKS)
    outcome = supervise(
        argv("runner", folder, steps),
        environment={ADDRESS: control.address(), KEY: control.key.hex()},
        folder=RunFolder(folder),
        control=control,
        world_size=len(_HOSTS) * _RANKS,
        hosts=[host for host in _HOSTS for _ in range(_RANKS)],
        on_tick=lambda: None,
        hang_seconds=float(hang_seconds),
        terminate=False,
    )
    print(json.dumps(asdict(outcome)))
    return outcome.exit_code


def runner(folder: str, steps: str) -> int:
    """As deepspeed.launcher.runner: where pdsh was killed, it answers 0."""
    exported = {name: os.environ[name] for name in (ADDRESS, KEY, "PYTHONPATH")}
    line = "".join(f"export {name}={shlex.quote(value)}; " for name, value in exported.items())
    line += f"cd {shlex.quote(os.getcwd())}; {shlex.join(argv('node', folder, steps, '%n'))}"
    keep_alive = {"PDSH_SSH_ARGS_APPEND": "-oServerAliveInterval=5 -oServerAliveCountMax=3"}
    pdsh = ["pdsh", "-S", "-R", "ssh", "-w", ",".join(_HOSTS), line]
    return max(0, subprocess.Popen(pdsh, env=os.environ | keep_alive).wait())


def node(folder: str, steps: str, number: str) -> int:
    """As deepspeed.launcher.launch: it looks once a second, and the first rank that failed ends those of this host."""
    first = int(number) * _RANKS
    own = range(first, first + _RANKS)
    ranks = [subprocess.Popen(argv("rank", folder, steps, str(rank))) for rank in own]
    while any(rank.poll() is None for rank in ranks):
        bad = [rank.returncode for rank in ranks if rank.poll() not in (None, 0)]
        if bad:
            for rank in ranks:
                rank.terminate()
            for rank in ranks:
                rank.wait()
            print(f"[ERROR] [launch.py:1] ['python'] exits with return code = {bad[0]}", flush=True)
            return int(bad[0])
        time.sleep(1)
    return 0


def rank(folder: str, steps: str, number: str) -> int:
    """Train, unless another rank is lost."""
    run = RunFolder(folder)
    status = RankStatus(int(number), socket.gethostname(), os.getpid(), "running")
    # The real one leaves after its step, which does not end without the others.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    run.make("private")
    run.write_status(status)
    control = ControlClient(os.environ, status, key=find_key(os.environ, run.control_key))
    others = _Others(status.rank)

    def report(state: RankState, step: int, error: str | None = None) -> None:
        last = replace(status, state=state, step=step, error=error)
        run.write_status(last)
        control.send_status(last)
        control.close()

    for step in range(1, int(steps) + 1):
        time.sleep(0.1)
        try:
            others.step()
        except ConnectionError:
            report("failed", step, "RuntimeError: [pair.cc:534] Connection closed by peer")
            return 1
        control.step_ended(step)
    report("done", int(steps))
    return 0


class _Others:
    """The other ranks, who do each step together; Connection errors where one is lost."""

    def __init__(self, rank: int) -> None:
        self._first = rank == 0
        self._connections: list[socket.socket] = []
        if self._first:
            with socket.create_server(("", _PORT)) as listener:
                self._connections = [listener.accept()[0] for _ in range(len(_HOSTS) * _RANKS - 1)]
        while not self._connections:
            try:
                self._connections.append(socket.create_connection((_HOSTS[0], _PORT)))
            except ConnectionRefusedError:
                time.sleep(0.05)  # rank 0 is not there yet

    def step(self) -> None:
        if not self._first:
            self._connections[0].sendall(b".")
        for connection in self._connections:
            if not connection.recv(1):
                raise ConnectionError
        if self._first:
            for connection in self._connections:
                connection.sendall(b".")


if __name__ == "__main__":
    roles = {"command": command, "runner": runner, "node": node, "rank": rank}
    sys.exit(roles[sys.argv[1]](*sys.argv[2:]))
