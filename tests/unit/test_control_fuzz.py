"""Messages without sense, before a rank is admitted and afterwards: they end nobody but their sender's connection."""

from __future__ import annotations

import json
import os
import random
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from dstrain.runs import protocol
from dstrain.runs.channel import RankEnd
from dstrain.runs.control_key import KEY
from dstrain.runs.protocol import ADDRESS, Busy, DumpStacks, Hello, Orphaned, RankStatus, Stacks, Step, encode
from dstrain.supervise.control_server import ControlServer
from tests.support.control_peers import sealed
from tests.unit.test_protocol import ANY_MESSAGE, JSON_VALUES, NO_MESSAGES

ROOT = Path(__file__).resolve().parents[2]
_AT_ONCE = 32  # connections: ranks that come and go, beside the one that must live

RANK = """
import os, sys, time
from dstrain.runs.control_key import KEY
from dstrain.runs.protocol import RankStatus
from dstrain.train.control_client import ControlClient
status = RankStatus(0, "n1", os.getpid(), "running")
control = ControlClient(os.environ, status, key=bytes.fromhex(os.environ[KEY]))
step = 0
while True:
    time.sleep(0.05); step += 1; control.step_ended(step)
"""

# What one message may be made of. Each example mutates these as often as the test wants.
SEEDS = st.lists(
    ANY_MESSAGE.map(encode)
    | JSON_VALUES.map(lambda value: json.dumps(value).encode())
    | st.binary(max_size=40)
    | st.sampled_from([line for line in NO_MESSAGES.values() if len(line) < 10_000]),
    min_size=5,
    max_size=40,
)
PIECES = [
    *(b"[" * 3000, b'{"type":' * 400, b"9" * 5000, b" " * 5000),
    *(b"\xff", b"\\ud800", b"\xed\xa0\x80", b"\0", b'"', b"{", b"}", b"\n"),
    *(b"null", b"true", b"NaN", b"-1", b"1e999", b"1; reboot"),
    *(b'"rank":0,', b'"pid":1,', b'"type":"hello"'),
]

ALLOWED = [
    encode(it) for it in (Step(1), Step(2**53 - 1), Busy("x"), Busy(None), Stacks("y" * 500), Orphaned())
]


class Messages:
    """Mutations of the seeds, without end."""

    def __init__(self, seeds: list[bytes], seed: int) -> None:
        self._seeds = seeds
        self._random = random.Random(seed)

    def one(self) -> bytes:
        """A line, now and then one that is a message; without its end in rare cases, or with several."""
        line = bytearray(self._random.choice(self._seeds).rstrip(b"\n"))
        for _ in range(self._random.choice((0, 0, 1, 1, 2, 5))):
            at = self._random.randint(0, len(line))
            match self._random.randrange(5):
                case 0:
                    line[at : at + self._random.randint(0, 4)] = self._random.randbytes(
                        self._random.randint(0, 4)
                    )
                case 1:
                    line[at:at] = self._random.choice(PIECES)
                case 2:
                    del line[at : at + self._random.randint(1, 20)]
                case 3:
                    other = self._random.choice(self._seeds)
                    line[at:] = other[self._random.randint(0, len(other)) :]
                case _ if line:
                    line[at % len(line)] ^= 1 << self._random.randrange(8)
        return bytes(line) + (b"" if self._random.random() < 0.02 else b"\n")

    def some(self, most: int) -> list[bytes]:
        """Mostly what a rank may send, for it is heard until the first that it may not."""
        count = self._random.randint(1, most)
        return [
            self.one() if self._random.random() < 0.1 else self._random.choice(ALLOWED) for _ in range(count)
        ]

    def raw(self, opening: bytes) -> bytes:
        """What somebody without the key may send: what he has heard, changed or cut, and anything else."""
        match self._random.randrange(4):
            case 0:
                return self.one()
            case 1:
                return opening[: self._random.randint(0, len(opening) - 1)] + self.one()
            case 2:
                changed = bytearray(opening)
                changed[self._random.randrange(len(changed))] ^= 1 << self._random.randrange(8)
                return bytes(changed) + self.one()
        return b"dstrain2" + self._random.randbytes(self._random.randint(0, 200))


class Fuzz:
    """A server that is polled here, and a real rank that must live."""

    def __init__(self, server: ControlServer, rank: subprocess.Popen[str]) -> None:
        self._server, self._rank = server, rank
        self._place = ("127.0.0.1", server.port)
        self.decoded = 0
        self.before = self.after = 0

    def check(self) -> None:
        """The supervisor lives, and so does the rank: it is heard, and hears."""
        known = self._server.ranks[0]
        assert self._rank.poll() is None and known.lost_at is None and known.killed_by is None
        step, known.stacks = known.step, None
        self._server.broadcast(DumpStacks())
        self._poll(lambda: known.stacks is not None and known.step > step)

    def without_key(self, messages: Messages) -> None:
        for connection in (connections := self._connect()):
            opening = RankEnd(self._server.key, self._server.launch).take_handshake()
            with suppress(OSError):
                connection.send(messages.raw(opening))
            self.before += 1
        self._end(connections)

    def before_hello(self, messages: Messages) -> None:
        """With the key: what is sent in place of a hello."""
        decoded = self.decoded
        self._end(self._greet([messages.one() for _ in range(_AT_ONCE)]))
        self.before += self.decoded - decoded

    def after_hello(self, messages: Messages) -> None:
        sent = []
        for number in range(1, _AT_ONCE + 1):
            self._server.ranks.pop(number, None)
            status = RankStatus(number, "n2", 100 + number, "running")
            sent.append(encode(Hello(self._server.launch, status)) + b"".join(messages.some(40)))
        decoded = self.decoded
        self._end(self._greet(sent))
        self.after += self.decoded - decoded

    def _greet(self, contents: list[bytes]) -> list[socket.socket]:
        connections = self._connect()
        ends = [RankEnd(self._server.key, self._server.launch) for _ in connections]
        for connection, end in zip(connections, ends, strict=True):
            connection.send(end.take_handshake())

        def shaken() -> bool:
            for connection, end in zip(connections, ends, strict=True):
                if not end.established:
                    with suppress(BlockingIOError):
                        list(end.feed(connection.recv(4096)))
            return all(end.established for end in ends)

        self._poll(shaken)
        for connection, end, content in zip(connections, ends, contents, strict=True):
            with suppress(OSError):
                connection.send(end.take_handshake() + sealed(end, content))
        return connections

    def _connect(self) -> list[socket.socket]:
        connections = [socket.create_connection(self._place) for _ in range(_AT_ONCE)]
        for connection in connections:
            connection.setblocking(False)
        return connections

    def _end(self, connections: list[socket.socket]) -> None:
        """Have it all read, and leave. With a reset: a million connections would use up the ports otherwise."""
        for _ in range(3):
            self._server.poll()
        for connection in connections:
            with suppress(OSError):
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()
        self._poll(lambda: len(self._server._peers) == 1)

    def _poll(self, until: object) -> None:
        assert callable(until)
        deadline = time.monotonic() + 30
        while not until():
            assert time.monotonic() < deadline
            self._server.poll()


@contextmanager
def fuzzing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fuzz]:
    with ControlServer(1 + _AT_ONCE) as server:
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            ADDRESS: server.address(),
            KEY: server.key.hex(),
        }
        rank = subprocess.Popen([sys.executable, "-c", RANK], env=environment, text=True)
        try:
            fuzz = Fuzz(server, rank)
            fuzz._poll(lambda: 0 in server.ranks)
            real = protocol.decode

            def counting(line: bytes) -> protocol.Message:
                fuzz.decoded += 1
                return real(line)

            monkeypatch.setattr(protocol, "decode", counting)
            fuzz.check()
            yield fuzz
            fuzz.check()
        finally:
            rank.kill()
            rank.wait()


def _fuzz(fuzz: Fuzz, examples: int, rounds: int) -> None:
    @settings(
        deadline=None,
        max_examples=examples,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(seeds=SEEDS, seed=st.integers(0, 2**64 - 1))
    def some(seeds: list[bytes], seed: int) -> None:
        messages = Messages(seeds, seed)
        for number in range(rounds):
            fuzz.without_key(messages)
            fuzz.before_hello(messages)
            if number % 4 == 0:  # many messages a connection
                fuzz.after_hello(messages)
        fuzz.check()

    some()


def test_no_message_ends_a_supervisor_or_a_rank_that_should_live(monkeypatch: pytest.MonkeyPatch) -> None:
    with fuzzing(monkeypatch) as fuzz:
        _fuzz(fuzz, examples=5, rounds=2)
    assert fuzz.before > 400 and fuzz.after > 200


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_a_million_messages_end_no_supervisor_and_no_rank_that_should_live(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Half of them before the hello. What is counted has been read, after a proof of the key too."""
    begun = time.monotonic()
    with fuzzing(monkeypatch) as fuzz:
        while fuzz.before < 500_000 or fuzz.after < 500_000:
            _fuzz(fuzz, examples=20, rounds=40)
            seconds = time.monotonic() - begun
            print(f"{seconds:.0f} s: {fuzz.before} before the hello, {fuzz.after} after it", flush=True)
