"""Either end of a control connection, played by a test: what it sends is up to the test."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from dstrain.runs.channel import MAX_RECORD_BYTES, RankEnd, SupervisorEnd
from dstrain.runs.protocol import (
    MAX_RANK_MESSAGE_BYTES,
    MAX_SUPERVISOR_MESSAGE_BYTES,
    DumpStacks,
    Hello,
    Message,
    MessageReader,
    RankStatus,
    Step,
    encode,
)
from dstrain.supervise.control_server import ControlServer

_SECONDS = 20


class FakeRank:
    """A connection to a server that is polled here; with ``greet`` it proves that it knows the key."""

    def __init__(self, server: ControlServer, *, greet: bool = True) -> None:
        self.server = server
        self.connection = socket.create_connection((server_host(server), server.port))
        self.connection.settimeout(0)
        self.channel = RankEnd(server.key, server.launch)
        self.reader = MessageReader(MAX_SUPERVISOR_MESSAGE_BYTES)
        self.ended = False
        if greet:
            self.greet()

    def greet(self) -> None:
        self.send_raw(self.channel.take_handshake())

        def proved() -> bool:
            self.read()
            return self.channel.established

        poll(self.server, proved)
        self.send_raw(self.channel.take_handshake())

    def send(self, content: bytes) -> None:
        """As the rank of the proved key."""
        self.send_raw(sealed(self.channel, content))

    def send_raw(self, content: bytes) -> None:
        """In the background where it is more than the sockets take; an error is the server's refusal."""

        def work() -> None:
            with suppress(OSError):
                self.connection.settimeout(10)
                self.connection.sendall(content)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        poll(self.server, lambda: not thread.is_alive())
        self.connection.settimeout(0)

    def read(self) -> Message | None:
        with suppress(BlockingIOError):
            try:
                received = self.connection.recv(65536)
            except ConnectionError:
                received = b""
            self.ended = self.ended or not received
            for content in self.channel.feed(received):
                self.reader.feed(content)
        return self.reader.next_message()

    def wait_for(self, kind: type[Message]) -> Message:
        found: list[Message | None] = []

        def come() -> bool:
            found.append(self.read())
            return isinstance(found[-1], kind)

        poll(self.server, come)
        assert found[-1] is not None
        return found[-1]

    def wait_for_the_end(self) -> None:
        def ended() -> bool:
            self.read()
            return self.ended

        poll(self.server, ended)

    def hello(self, rank: int, host: str = "n1") -> None:
        self.send(encode(Hello(self.server.launch, RankStatus(rank, host, 100 + rank, "running"))))

    def serves(self, rank: int, step: int) -> None:
        """The server hears this rank, and the rank hears the server."""
        self.send(encode(Step(step)))
        poll(self.server, lambda: self.server.ranks[rank].step == step)
        self.server.broadcast(DumpStacks())
        self.wait_for(DumpStacks)


def sealed(channel: RankEnd | SupervisorEnd, content: bytes) -> bytes:
    """``content`` in as few records as hold it."""
    pieces = range(0, len(content), MAX_RECORD_BYTES)
    return b"".join(channel.seal(content[at : at + MAX_RECORD_BYTES]) for at in pieces)


def server_host(server: ControlServer) -> str:
    """Where it is found from this machine."""
    return server.address().rpartition(":")[0].rpartition("@")[2].split(",")[-1].strip("[]")


def poll(server: ControlServer, until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _SECONDS
    while not until():
        assert time.monotonic() < deadline
        server.poll()
        time.sleep(0.001)


@contextmanager
def connected(server: ControlServer, *, greet: bool = True) -> Iterator[FakeRank]:
    rank = FakeRank(server, greet=greet)
    try:
        yield rank
    finally:
        rank.connection.close()


class FakeSupervisor:
    """What a rank has connected to, and that knows its key."""

    def __init__(self, connection: socket.socket, key: bytes, launch: str) -> None:
        self.connection = connection
        connection.settimeout(_SECONDS)
        self.channel = SupervisorEnd(key, launch, set())
        self._reader = MessageReader(MAX_RANK_MESSAGE_BYTES)

    def next_message(self) -> Message:
        while (message := self._reader.next_message()) is None:
            received = self.connection.recv(65536)
            assert received, "the rank has closed the connection"
            for content in self.channel.feed(received):
                self._reader.feed(content)
            self.connection.sendall(self.channel.take_handshake())
        return message

    def send(self, content: bytes) -> None:
        self.connection.sendall(sealed(self.channel, content))
