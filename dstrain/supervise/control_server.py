"""The supervisor's line to every rank, on whatever host and however it was started.

Each rank connects to the supervisor over TCP (`dstrain.train.control_client`), says what it does, and ends when the
line does. So a rank that dies is known at once, on every host; and a run whose supervisor, host or cable is gone ends
by itself everywhere. The kernel watches an idle line (keepalive), so a supervisor that is stopped with Ctrl-Z ends
nothing. The ranks of a host are told of each other: what one that is stopped or dead can't say, its neighbours do.

Messages are JSON objects, a line each; `plan.run_folder.RankStatus` is what a rank says of itself.
"""

from __future__ import annotations

import errno
import json
import resource
import secrets
import selectors
import socket
import time
from dataclasses import dataclass, field
from typing import Any

from dstrain.runs.addresses import own_addresses
from dstrain.runs.protocol import SILENCE_SECONDS, keep_alive, plan_digest
from dstrain.runs.run_folder import RankStatus

_LOOPBACK = "127.0.0.1"
_OTHER_FILES = 256
_MOST_BYTES = 1024 * 1024
"""Of one message. A rank says little; whoever says more is no rank."""


@dataclass
class Line:
    """What is known of one rank through its line.

    Attributes:
        status: its newest word.
        step: the last step that it has ended; ``step_at`` when that was heard, by `time.monotonic`, or the end of
            what it did since.
        busy: what it does between two steps, if it is not in one.
        lost_at: when the line ended, by `time.time`; None while it holds.
        by_silence: it ended because nothing answered any more: the host or the network is gone, not the process alone.
        stacks: where its threads stand, as it was asked last.
        orphaned_at: when it said that its launcher had ended, by `time.time`.
        stopped_at: since when it is stopped by a signal, by `time.monotonic`; None while it runs.
        killed_by: the signal that ended it, as another rank of its host saw it.
        out_of_memory: what the kernel said of its death.
        tail: the end of its log, sent with a failure.
    """

    status: RankStatus
    step: int = 0
    step_at: float = 0.0
    busy: str | None = None
    lost_at: float | None = None
    by_silence: bool = False
    stacks: str | None = None
    orphaned_at: float | None = None
    stopped_at: float | None = None
    killed_by: int | None = None
    out_of_memory: str | None = None
    tail: list[str] = field(default_factory=list)


class ControlServer:
    """Listens on a free port until `close`. Nothing blocks: `poll` handles what has come.

    Args:
        world_size: ranks are numbered below it.
        plan: sent to each rank that sees none, or another one: its host may have no disk in common with this one.
        only_here: all ranks are on this machine, and nobody else may connect. Their lines survive the loss of a
            network.
    """

    def __init__(self, world_size: int, plan: str = "", *, only_here: bool = False) -> None:
        _have_room_for(world_size)
        # What a rank must name to be heard: one of an earlier launch that lives on somewhere is not.
        self.launch = secrets.token_hex(8)
        self._world_size = world_size
        self._plan, self._digest = plan, plan_digest(plan)
        self._addresses = [_LOOPBACK] if only_here else own_addresses()
        self._listener = socket.create_server((_LOOPBACK if only_here else "", 0), backlog=world_size)
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._received: dict[socket.socket, bytes] = {}
        self._rank_of: dict[socket.socket, int] = {}
        self._stopping = False
        self.lines: dict[int, Line] = {}

    def address(self) -> str:
        """What `runs.protocol.ADDRESS` tells the ranks: where they find this line, from any host."""
        return f"{self.launch}@{','.join(self._addresses)}:{self.port}"

    def poll(self) -> None:
        """Take in what has come since the last call; nothing once it is closed."""
        if self._listener.fileno() < 0:
            return
        for key, _ in self._selector.select(timeout=0):
            if key.fileobj is self._listener:
                self._accept()
            else:
                assert isinstance(key.fileobj, socket.socket)
                self._receive(key.fileobj)

    def tell(self, what: str) -> None:
        """Say a word to all ranks: ``stop`` (leave in order; also to those that come later), ``stacks`` (say where
        you stand)."""
        self._stopping = self._stopping or what == "stop"
        for connection in list(self._rank_of):
            self._send(connection, {"say": what})

    def close(self) -> None:
        """End every line: each rank that is still there ends at once."""
        for connection in list(self._received):
            self._drop(connection)
        if self._listener.fileno() >= 0:
            self._selector.close()
            self._listener.close()

    def __enter__(self) -> ControlServer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _accept(self) -> None:
        """All that wait: a thousand ranks come within seconds, and each waits for its answer."""
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return  # no more, or it went away again
            connection.setblocking(False)
            keep_alive(connection)
            self._received[connection] = b""
            self._selector.register(connection, selectors.EVENT_READ)

    def _receive(self, connection: socket.socket) -> None:
        try:
            new = connection.recv(64 * 1024)
        except BlockingIOError:
            return
        except OSError as error:
            self._drop(connection, by_silence=_is_silence(error))
            return
        if not new:
            self._drop(connection)
            return
        *whole, rest = (self._received[connection] + new).split(b"\n")
        self._received[connection] = rest
        for text in whole:
            if connection not in self._received:
                return  # it was dropped meanwhile
            try:
                self._hear(connection, json.loads(text))
            except (ValueError, KeyError, TypeError):
                self._drop(connection)  # no rank of ours
                return
        if len(rest) > _MOST_BYTES:
            self._drop(connection)

    def _hear(self, connection: socket.socket, message: dict[str, Any]) -> None:
        rank = self._rank_of.get(connection)
        if rank is None:
            rank = self._meet(connection, message)
            return
        line = self.lines[rank]
        if "status" in message:
            line.status = _heard_now(message["status"])
        if "step" in message:
            line.step, line.step_at = int(message["step"]), time.monotonic()
        if "busy" in message:
            line.busy, line.step_at = message["busy"], time.monotonic()
        if "orphaned" in message:
            line.orphaned_at = time.time()
        self._hear_of_neighbours(message)
        line.stacks = message.get("stacks", line.stacks)
        line.tail = message.get("tail", line.tail)

    def _meet(self, connection: socket.socket, message: dict[str, Any]) -> int:
        """The first message: who it is. Raises ValueError where it is none of this run's ranks."""
        status = _heard_now(message["status"])
        if message["launch"] != self.launch or not 0 <= status.rank < self._world_size:
            raise ValueError("it is no rank of this launch")
        self._rank_of[connection] = status.rank
        self.lines[status.rank] = Line(status, step_at=time.monotonic())
        same = not self._plan or message.get("plan") == self._digest
        self._send(connection, {"say": "welcome"} if same else {"plan": self._plan})
        if self._stopping:
            self._send(connection, {"say": "stop"})
        self._introduce(status.host)
        return status.rank

    def _introduce(self, host: str) -> None:
        """Tell the ranks of a host of each other: they see what becomes of their neighbours."""
        there = {rank: line.status.pid for rank, line in self.lines.items() if line.status.host == host}
        for connection, rank in list(self._rank_of.items()):
            if rank in there and len(there) > 1:
                self._send(connection, {"neighbours": {r: pid for r, pid in there.items() if r != rank}})

    def _hear_of_neighbours(self, message: dict[str, Any]) -> None:
        for rank in message.get("stopped", []):
            self.lines[rank].stopped_at = self.lines[rank].stopped_at or time.monotonic()
        for rank in message.get("goes_on", []):
            self.lines[rank].stopped_at = None
        for rank, number in message.get("killed", {}).items():
            self.lines[int(rank)].killed_by = int(number)
        for rank, words in message.get("out_of_memory", {}).items():
            self.lines[int(rank)].out_of_memory = words

    def _send(self, connection: socket.socket, message: dict[str, Any]) -> None:
        """Small, but for the plan: a line whose other end takes nothing for seconds is dead."""
        try:
            connection.settimeout(SILENCE_SECONDS)
            connection.sendall(json.dumps(message).encode() + b"\n")
            connection.setblocking(False)
        except OSError as error:
            if _is_silence(error):  # else it was closed, and its last words may still wait to be read
                self._drop(connection, by_silence=True)

    def _drop(self, connection: socket.socket, *, by_silence: bool = False) -> None:
        if connection not in self._received:
            return
        rank = self._rank_of.pop(connection, None)
        if rank is not None:
            self.lines[rank].lost_at = time.time()
            self.lines[rank].by_silence = by_silence
        del self._received[connection]
        self._selector.unregister(connection)
        connection.close()


def _have_room_for(world_size: int) -> None:
    """A connection is an open file, and 1024 of these are what a process may usually have without asking for more."""
    wanted = world_size + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _is_silence(error: OSError) -> bool:
    return isinstance(error, TimeoutError) or error.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH)


def _heard_now(record: dict[str, Any]) -> RankStatus:
    """A rank's word, with the time of this machine's clock: which of two ranks failed first, one clock must tell."""
    return RankStatus(**{**record, "time": time.time()})
