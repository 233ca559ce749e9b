"""The program that runs on each machine that is checked: ``python -m dstrain.diagnostics.host``.

It reads questions from standard input and answers on standard output, a JSON object a line, until its input ends:
with the connection it ends too, and with it whatever it has started. A login that says something of its own
(a banner, an echo in .bashrc) is told apart by the mark in front of each answer.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dstrain.child_process import module_command
from dstrain.diagnostics.host_facts import facts
from dstrain.launch.command import free_port
from dstrain.runs.this_machine import listening_socket, port_taken
from dstrain.strict_json import to_json

MARK = "dstrain-doctor "
_CONNECT_SECONDS = 3.0
_MOST_SECONDS = 1200
"""Of its life: a connection that was cut, and not closed, does not end its input for hours."""


class Host:
    """This machine, as it answers. Each public method is a question of that name, its arguments the question's."""

    def __init__(self) -> None:
        self._listeners: list[socket.socket] = []
        self._questions = b""

    def answer_all(self) -> None:
        """Answer until there are no more questions."""
        while (question := self._next()) is not None:
            ask = question.pop("ask")
            answers: dict[str, Callable[..., dict[str, Any]]] = {
                "facts": facts,
                "time": self.time,
                "listen": self.listen,
                "reach": self.reach,
                "free_port": self.free_port,
                "port_taken": self.port_taken,
                "exchange": self.exchange,
            }
            print(f"{MARK}{to_json(answers[ask](**question))}", flush=True)

    def time(self) -> dict[str, Any]:
        return {"time": time.time()}

    def listen(self) -> dict[str, Any]:
        """Listen where ranks do: on a port like MASTER_PORT, and on one that the kernel chooses, as gloo has."""
        for port in (free_port(), 0):
            self._listeners.append(listening_socket(port))
        return {"ports": [listener.getsockname()[1] for listener in self._listeners]}

    def free_port(self) -> dict[str, Any]:
        return {"port": free_port()}

    def port_taken(self, port: int) -> dict[str, Any]:
        """``why`` nothing can listen there; None where it is free."""
        return {"why": port_taken(port)}

    def reach(self, targets: list[dict[str, Any]]) -> dict[str, Any]:
        """Connect to each target (``name``; ``hosts``, of which one must answer; ``ports``, which all must), at once.

        Returns ``unreached``: for each that can't be reached its name, the port and why.
        """
        with ThreadPoolExecutor(max_workers=32) as pool:
            tried = pool.map(_try, targets)
        return {"unreached": [one for one in tried if one is not None]}

    def exchange(self, environment: dict[str, str], device: str, limit: float) -> dict[str, Any]:
        """Be a rank of `dstrain.diagnostics.network_exchange`.

        Returns ``said``: what it said, in order; ``error``: how it failed, or None.
        """
        command = [*module_command("dstrain.diagnostics.network_exchange"), device]
        with (
            subprocess.Popen(
                command,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
                text=True,
                errors="replace",
            ) as process,
            ThreadPoolExecutor(max_workers=1) as pool,
        ):
            outputs = pool.submit(process.communicate)
            late = self._wait(process, limit)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            out, errors = outputs.result()
        said = [json.loads(line[len(MARK) :]) for line in out.splitlines() if line.startswith(MARK)]
        lines = [line for line in errors.splitlines() if line.strip()]
        error = None
        if late:
            error = f"did not finish within {limit:.0f} s"
        elif process.returncode:
            error = lines[-1] if lines else f"exit code {process.returncode}"
        return {"said": said, "error": error}

    def _wait(self, process: subprocess.Popen[str], seconds: float) -> bool:
        """Until it ends or nobody asks any more; True where it took too long."""
        deadline = time.monotonic() + seconds
        while process.poll() is None:
            if time.monotonic() > deadline:
                return True
            readable, _, _ = select.select([0], [], [], 0.1)
            if readable and not self._read():
                return False
        return False

    def _next(self) -> dict[str, Any] | None:
        while b"\n" not in self._questions:
            if not self._read():
                return None
        line, self._questions = self._questions.split(b"\n", 1)
        question: dict[str, Any] = json.loads(line)
        return question

    def _read(self) -> bool:
        """Take in what is there; False at the end."""
        new = os.read(0, 64 * 1024)
        self._questions += new
        return bool(new)


def _try(target: dict[str, Any]) -> dict[str, Any] | None:
    for port in target["ports"]:
        with ThreadPoolExecutor(max_workers=len(target["hosts"])) as pool:
            failures = list(pool.map(lambda host, port=port: _connect(host, port), target["hosts"]))
        if None not in failures:
            return {"name": target["name"], "port": port, "why": "; ".join(map(str, failures))}
    return None


def _connect(host: str, port: int) -> str | None:
    """Why there is no connection; None where there is one."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        return f"the name {host} is not known here ({error})"
    address = str(found[0][4][0])
    try:
        socket.create_connection((address, port), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        reason = "no answer" if isinstance(error, TimeoutError) else error.strerror or str(error)
        return reason if address == host else f"{reason} at {address}"
    return None


if __name__ == "__main__":
    signal.alarm(_MOST_SECONDS)
    Host().answer_all()
