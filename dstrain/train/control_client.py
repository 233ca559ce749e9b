"""A rank's line to the supervisor: it says what it does, and ends when nobody is there any more."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import select
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from dstrain.errors import DstrainError
from dstrain.runs.protocol import ADDRESS, keep_alive
from dstrain.runs.run_folder import RankStatus
from dstrain.train.local_ranks import LocalRanks

GONE = 1
"""The exit code of a rank that lost its supervisor: its status says why."""
_CONNECT_SECONDS = 5.0
_ANSWER_SECONDS = 120.0  # of a supervisor that a thousand ranks ask at once
_SECONDS_BETWEEN_STEPS = 0.5
_SECONDS_BETWEEN_LOOKS = 0.5


class ControlClient:
    """Without a supervisor (launch.sh typed by hand) nothing is said and nothing is awaited.

    A thread listens, and looks at the processes beside this one. When the line ends, or this rank's launcher, it ends
    this process: whatever the other threads wait for (a collective of a rank that is gone, a disk), it will not come.
    """

    def __init__(
        self, environment: Mapping[str, str], status: RankStatus, plan_seen: str | None = None
    ) -> None:
        """Connect, say hello, and take in the answer.

        Args:
            plan_seen: `plan_digest` of the plan.json that this host sees; None where it sees none.

        Raises:
            DstrainError: there is a supervisor, and it can't be reached.
        """
        self.asked_to_stop = False
        self.plan: str | None = None
        """The supervisor's plan.json, where it is another than the one that was seen."""
        self.launch = ""
        """Names this launch; empty without a supervisor."""
        self._connection: socket.socket | None = None
        self._sending = threading.Lock()
        self._step_told_at = 0.0
        self._neighbours = LocalRanks()
        address = environment.get(ADDRESS)
        if not address:
            return
        self.launch, _, places = address.partition("@")
        hosts, _, port = places.rpartition(":")
        self._connection = _connect(hosts.split(","), int(port))
        keep_alive(self._connection)
        self._send({"launch": self.launch, "status": asdict(status), "plan": plan_seen})
        answer, received = _first_message(self._connection)
        self.plan = answer.get("plan")
        threading.Thread(target=self._listen, args=(received,), name="control", daemon=True).start()

    def say(self, status: RankStatus, tail: list[str] | None = None) -> None:
        """The rank's newest word; with a failure the end of its log, which may lie on a disk of its own."""
        if status.state == "failed":
            self._send(self._neighbours.news())  # why a neighbour died, if this rank fails for want of it
        self._send({"status": asdict(status) | {"time": time.time()}} | ({"tail": tail} if tail else {}))

    def ended(self, step: int) -> None:
        """A step has ended. Fast steps are told now and then, to keep the supervisor idle."""
        now = time.monotonic()
        if now - self._step_told_at >= _SECONDS_BETWEEN_STEPS:
            self._step_told_at = now
            self._send({"step": step})

    @contextlib.contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """Between steps: a validation loss or a checkpoint may take far longer than a step, and is no hang."""
        self._send({"busy": what})
        try:
            yield
        finally:
            self._send({"busy": None})

    def ending(self) -> None:
        """No step follows: what is left to do takes its time, once."""
        self._send({"busy": "the end of the run"})

    def close(self) -> None:
        """The rank's last word was said: from now on the line's end is nobody's."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def _send(self, message: dict[str, Any]) -> None:
        connection = self._connection
        if connection is None:
            return
        # An error is the line's end, which the thread that listens finds.
        with self._sending, contextlib.suppress(OSError):
            connection.sendall(json.dumps(message).encode() + b"\n")

    def _listen(self, received: bytes) -> None:
        connection = self._connection
        assert connection is not None
        poll = select.poll()
        poll.register(connection, select.POLLIN)
        while self._connection is not None:
            *whole, received = received.split(b"\n")
            for text in whole:
                self._hear(json.loads(text))
            if not poll.poll(_SECONDS_BETWEEN_LOOKS * 1000):
                self._look_around()
                continue
            try:
                new = connection.recv(64 * 1024)
            except OSError as error:
                self._end(f"nothing came from the supervisor any more ({error.strerror})")
                return
            if not new:
                self._end("the supervisor has ended the run, or is gone")
                return
            received += new

    def _hear(self, message: dict[str, Any]) -> None:
        if message.get("say") == "stop":
            self.asked_to_stop = True
        elif message.get("say") == "stacks":
            self._send({"stacks": _stacks()})
        self._neighbours.meet({int(rank): pid for rank, pid in message.get("neighbours", {}).items()})

    def _look_around(self) -> None:
        news = self._neighbours.news()
        if news:
            self._send(news)
        if self._neighbours.launcher_is_gone():
            self._send({"orphaned": True})
            self._end("its launcher is gone")

    def _end(self, why: str) -> None:
        if self._connection is None:
            return  # closed by us
        with contextlib.suppress(OSError):  # no word, on a full disk
            print(f"dstrain: this rank ends: {why}", file=sys.stderr, flush=True)
        self._neighbours.kill_stopped()
        os._exit(GONE)


def _connect(hosts: list[str], port: int) -> socket.socket:
    """To the first address that answers. Raises DstrainError where none does."""
    tried = []
    for host in hosts:
        try:
            connection = socket.create_connection((host, port), timeout=_CONNECT_SECONDS)
        except OSError as error:
            tried.append(f"{host}: {error.strerror or error}")
            continue
        connection.settimeout(None)
        return connection
    raise DstrainError(
        f"{socket.gethostname()} can't reach the supervisor at port {port} ({'; '.join(tried)})",
        hint="open the way from this host to the machine that `dstrain run` was started on, or start launch.sh by hand",
    )


def _first_message(connection: socket.socket) -> tuple[dict[str, Any], bytes]:
    """The supervisor's answer to hello, and what came after it. Raises DstrainError where none comes."""
    received = b""
    connection.settimeout(_ANSWER_SECONDS)
    try:
        while b"\n" not in received:
            new = connection.recv(64 * 1024)
            if not new:
                raise ConnectionError("it closed the connection")
            received += new
    except OSError as error:
        raise DstrainError(f"the supervisor does not answer {socket.gethostname()}: {error}") from error
    connection.settimeout(None)
    text, _, rest = received.partition(b"\n")
    return json.loads(text), rest


def _stacks() -> str:
    """Where every thread of this process stands."""
    with tempfile.TemporaryFile("w+b") as file:  # faulthandler writes to a descriptor
        faulthandler.dump_traceback(file)
        file.seek(0)
        return file.read().decode(errors="replace")
