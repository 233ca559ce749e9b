"""The control connection under attack: floods, somebody in the middle, too few descriptors, hosts of IPv6 alone."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from dstrain.errors import DstrainError
from dstrain.runs.protocol import ControlAddress, DumpStacks, Hello, RankStatus, Step, Welcome
from dstrain.runs.this_machine import own_addresses
from dstrain.supervise import control_server
from dstrain.supervise.control_server import ControlServer
from dstrain.train import control_connection
from dstrain.train.control_connection import ControlConnection, join
from tests.support.control_flood import started, supervising
from tests.support.control_peers import connected, poll

ROOT = Path(__file__).resolve().parents[2]

# Somebody in the middle.


class Middle:
    """Between a rank and the supervisor. ``attack`` is asked what becomes of the bytes that come, with the number of
    the connection and whether they come from the rank; it gives what goes on, and what goes back."""

    Attack = Callable[[int, bool, bytes], tuple[bytes, bytes]]

    def __init__(self, port: int) -> None:
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self.port = self._listener.getsockname()[1]
        self.attack: Middle.Attack = lambda number, up, content: (content, b"")
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        number = 0
        with suppress(OSError):
            while True:
                rank = self._listener.accept()[0]
                supervisor = socket.create_connection(("127.0.0.1", self._port))
                self._open += [rank, supervisor]
                for up, source, target in ((True, rank, supervisor), (False, supervisor, rank)):
                    arguments = (number, up, source, target)
                    threading.Thread(target=self._carry, args=arguments, daemon=True).start()
                number += 1

    def _carry(self, number: int, up: bool, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while content := source.recv(65536):
                on, back = self.attack(number, up, content)
                source.sendall(back)  # before the other end can answer
                target.sendall(on)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for open_ in (self._listener, *self._open):
            with suppress(OSError):
                open_.shutdown(socket.SHUT_RDWR)
            open_.close()


def _cut(content: bytes) -> tuple[bytes, bytes]:
    raise ConnectionAbortedError


ATTACKS: dict[str, Callable[[bytes], tuple[bytes, bytes]]] = {
    "injects": lambda content: (content + b"\0\0\0\5stop\n" + bytes(32), b""),
    "injects before": lambda content: (b'{"type":"stop"}\n' + content, b""),
    "changes": lambda content: (content[:-1] + bytes([content[-1] ^ 1]), b""),
    "repeats": lambda content: (content * 2, b""),
    "reflects": lambda content: (b"", content),
    "passes on and reflects": lambda content: (content, content),
    "swallows": lambda content: (b"", b""),
    "swallows an end": lambda content: (content[:-1], b""),
    "cuts": _cut,
    "speaks instead": lambda content: (b"[" * 100_000, b""),
}


@contextmanager
def polled(server: ControlServer) -> Iterator[threading.Lock]:
    """In the background; who else uses the server holds the lock."""
    done, lock = threading.Event(), threading.Lock()

    def work() -> None:
        while not done.wait(0.005):
            with lock:
                server.poll()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield lock
    finally:
        done.set()
        thread.join()


def wait(until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def hello(server: ControlServer, rank: int) -> Hello:
    return Hello(server.launch, RankStatus(rank, f"n{rank}", 100 + rank, "running"))


class Attacked:
    """A server with a witness as rank 0, and a way to it that somebody watches."""

    def __init__(self, server: ControlServer, lock: threading.Lock) -> None:
        self.server = server
        self._lock = lock
        self.middle = Middle(server.port)
        self.straight = ControlAddress(server.launch, ("127.0.0.1",), server.port)
        self.address = replace(self.straight, port=self.middle.port)
        self.witness, _ = join(self.straight, server.key, hello(server, 0))
        self._step = 0

    def join(self, rank: int) -> ControlConnection:
        connection, welcome = join(self.address, self.server.key, hello(self.server, rank))
        assert welcome == Welcome()
        return connection

    def serves(self) -> None:
        """The witness is heard, and hears."""
        self._step += 1
        self.witness.send(Step(self._step))
        wait(lambda: self.server.ranks[0].step == self._step)
        self.ask()
        while DumpStacks() not in list(self.witness.received()):
            self.witness.receive()

    def ask(self) -> None:
        with self._lock:
            self.server.broadcast(DumpStacks())


@pytest.fixture
def attacked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Attacked]:
    monkeypatch.setattr(control_server, "HELLO_SECONDS", 0.5)
    monkeypatch.setattr(control_connection, "_PROOF_SECONDS", 0.5)
    monkeypatch.setattr(control_connection, "_ANSWER_SECONDS", 1.0)
    monkeypatch.setattr(control_connection, "_RETRY_SECONDS", 1.0)
    with ControlServer(10) as server, polled(server) as lock:
        attacked = Attacked(server, lock)
        yield attacked
        attacked.middle.close()


@pytest.mark.parametrize("upwards", [True, False], ids=["from the rank", "from the supervisor"])
@pytest.mark.parametrize("name", ATTACKS)
def test_who_meddles_with_the_handshake_costs_that_connection(
    attacked: Attacked, name: str, upwards: bool
) -> None:
    """The rank comes again, and is admitted."""
    tried: list[int] = []

    def attack(number: int, up: bool, content: bytes) -> tuple[bytes, bytes]:
        if number == 0 and up == upwards and not tried:
            tried.append(number)
            return ATTACKS[name](content)
        return content, b""

    attacked.middle.attack = attack
    connection = attacked.join(1)
    assert tried == [0]
    connection.send(Step(3))
    wait(lambda: attacked.server.ranks[1].step == 3)
    assert attacked.server.ranks[1].lost_at is None
    attacked.serves()


@pytest.mark.parametrize("name", [name for name in ATTACKS if name != "swallows"])
def test_who_meddles_with_what_a_rank_says_costs_that_connection(attacked: Attacked, name: str) -> None:
    connection = attacked.join(1)
    connection.send(Step(3))
    wait(lambda: attacked.server.ranks[1].step == 3)
    attacked.middle.attack = lambda number, up, content: ATTACKS[name](content) if up else (content, b"")
    with suppress(OSError):
        connection.send(Step(4))
        time.sleep(0.1)  # a record of its own
        connection.send(Step(5))
    if "reflects" in name:
        with pytest.raises(Exception, match="not what the other end sent next"):
            connection.receive()
        connection.close()
    wait(lambda: attacked.server.ranks[1].lost_at is not None)
    assert attacked.server.ranks[1].step in (3, 4, 5)
    assert attacked.server.ranks[1].status.state == "running"
    attacked.serves()


def test_what_is_left_out_ends_the_connection_with_what_follows(attacked: Attacked) -> None:
    connection = attacked.join(1)
    attacked.middle.attack = lambda number, up, content: (b"", b"")
    connection.send(Step(4))
    time.sleep(0.2)
    attacked.middle.attack = lambda number, up, content: (content, b"")
    connection.send(Step(5))
    wait(lambda: attacked.server.ranks[1].lost_at is not None)
    assert attacked.server.ranks[1].step == 0
    attacked.serves()


def test_who_meddles_with_what_the_supervisor_says_costs_that_connection(attacked: Attacked) -> None:
    for rank, (name, attack) in enumerate(
        [(name, attack) for name, attack in ATTACKS.items() if "swallows" not in name], start=1
    ):
        attacked.middle.attack = lambda number, up, content: (content, b"")
        connection = attacked.join(rank)
        attacked.middle.attack = lambda number, up, content, attack=attack: (  # type: ignore[misc]
            (content, b"") if up else attack(content)
        )
        attacked.ask()
        if name == "reflects":  # the rank hears nothing; the supervisor hears itself
            wait(lambda rank=rank: attacked.server.ranks[rank].lost_at is not None)  # type: ignore[misc]
        with suppress(EOFError, OSError, control_connection.AuthenticationError):
            while True:
                connection.receive()
                assert list(connection.received()) in ([], [DumpStacks()]), name
        with suppress(OSError):
            connection.close()
        wait(lambda rank=rank: attacked.server.ranks[rank].lost_at is not None)  # type: ignore[misc]
        while DumpStacks() not in list(attacked.witness.received()):
            attacked.witness.receive()
        attacked.serves()


def test_an_overheard_conversation_is_worth_nothing(attacked: Attacked) -> None:
    """All that a rank has said, said again: while it lives, and afterwards."""
    heard: list[bytes] = []

    def overhear(number: int, up: bool, content: bytes) -> tuple[bytes, bytes]:
        if up:
            heard.append(content)
        return content, b""

    attacked.middle.attack = overhear
    connection = attacked.join(1)
    connection.send(Step(3))
    wait(lambda: attacked.server.ranks[1].step == 3)
    for pieces in ([b"".join(heard)], heard):
        with socket.create_connection(("127.0.0.1", attacked.server.port)) as again:
            again.settimeout(10)
            with suppress(OSError):
                for piece in pieces:
                    again.sendall(piece)
            with suppress(ConnectionError):
                assert again.recv(100) == b"", "it is refused at its first bytes"
    assert attacked.server.ranks[1].lost_at is None
    attacked.serves()


def test_a_later_connection_takes_no_ranks_place(attacked: Attacked) -> None:
    connection = attacked.join(1)
    with pytest.raises(DstrainError, match="proves to be this run's supervisor"):
        attacked.join(1)
    connection.send(Step(7))
    wait(lambda: attacked.server.ranks[1].step == 7)
    attacked.serves()


def test_the_next_address_is_tried_where_one_is_not_the_supervisor() -> None:
    """As where two networks have the same addresses, or somebody listens on the first of them."""
    with ControlServer(1, only_here=True) as server, polled(server), socket.socket() as other:
        other.bind(("127.0.0.2", server.port))
        other.listen()
        threading.Thread(target=lambda: other.accept()[0].sendall(b"[" * 1000), daemon=True).start()
        address = ControlAddress(server.launch, ("127.0.0.2", "127.0.0.1"), server.port)
        connection, _ = join(address, server.key, hello(server, 0))
        connection.close()


def test_a_plan_that_a_rank_does_not_take_keeps_nobody_waiting() -> None:
    """Not a poll, nor a rank; and it is sent once the rank takes it."""
    plan = "x" * 8_000_000
    with ControlServer(2, plan) as server, connected(server) as slow, connected(server) as quick:
        slow.hello(0)
        poll(server, lambda: 0 in server.ranks)
        begun = time.monotonic()
        quick.hello(1)
        quick.wait_for(Welcome)
        assert time.monotonic() - begun < control_server.SILENCE_SECONDS / 2
        quick.serves(1, 5)
        assert slow.wait_for(Welcome) == Welcome(plan)
        slow.serves(0, 5)


def test_who_takes_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_server, "SILENCE_SECONDS", 0.5)
    with ControlServer(2, "x" * 8_000_000) as server, connected(server) as slow:
        slow.hello(0)
        poll(server, lambda: 0 in server.ranks and server.ranks[0].lost_at is not None)
        assert server.ranks[0].by_silence


# Descriptors.


@pytest.mark.parametrize("limit", ["ulimit -n 200", "ulimit -Hn 300 -Sn 100"])
def test_too_few_descriptors_are_said_at_once(limit: str) -> None:
    begun = time.monotonic()
    with started("supervisor", 400, limit=limit) as process:
        _, said = process.communicate(timeout=60)
    assert process.returncode != 0 and time.monotonic() - begun < 30
    last = [line for line in said.splitlines() if line.strip()][-2:]
    assert "DstrainError: 400 ranks need " in last[0] and "may open no more than " in last[0]
    assert "`ulimit -n " in last[1]


def test_400_ranks_are_heard_where_the_limit_can_be_raised() -> None:
    with supervising(400, limit="ulimit -Sn 200") as supervisor, ExitStack() as open_:
        with ThreadPoolExecutor(40) as pool:  # they all come at once
            for connection in pool.map(supervisor.join, range(400)):
                open_.callback(connection.close)
        told = supervisor.end()
    assert (told["ranks"], told["lost"]) == (400, [])


def test_few_ranks_need_few_descriptors() -> None:
    with supervising(8, limit="ulimit -n 200") as supervisor:
        connection = supervisor.join(7)
        assert supervisor.end()["ranks"] == 1
        connection.close()


def test_without_descriptors_the_supervisor_waits_and_goes_on() -> None:
    """Something else of its process has taken them."""
    with supervising(20, open_files=10) as supervisor:
        host, port = supervisor.address.hosts[0], supervisor.address.port
        first = supervisor.join(0)
        strangers = [socket.create_connection((host, port)) for _ in range(60)]
        time.sleep(1.0)
        second = supervisor.join(1)
        told = supervisor.end()
        for connection in (first, second, *strangers):
            with suppress(OSError):
                connection.close()
    assert (told["ranks"], told["lost"]) == (2, [])
    assert told["cpu_seconds"] < 0.5 * told["seconds"] and told["longest_poll"] < 1.0


# Floods.


def _flooded(connections: int, size: int, ranks: int, floods: int) -> tuple[dict[str, float], list[float]]:
    """What the supervisor said of itself, and how long each rank waited for its answer."""
    waited: list[float] = []
    with supervising(ranks + 1) as supervisor, ExitStack() as open_:
        host, port = supervisor.address.hosts[0], supervisor.address.port
        witness = supervisor.join(ranks)
        open_.callback(witness.close)
        begun = time.monotonic()
        processes = [
            open_.enter_context(started("flood", host, port, connections // floods, size // floods))
            for _ in range(floods)
        ]
        for rank in range(ranks):
            time.sleep(0.2)
            at = time.monotonic()
            open_.callback(supervisor.join(rank).close)
            waited.append(time.monotonic() - at)
        done = [json.loads(process.stdout.readline()) for process in processes]  # type: ignore[union-attr]
        assert (
            sum(it["connections"] for it in done) >= connections and sum(it["bytes"] for it in done) >= size
        )
        told = supervisor.end() | {"flood_seconds": time.monotonic() - begun}
    assert (told["ranks"], told["lost"]) == (ranks + 1, [])
    return told, waited


def test_a_small_flood() -> None:
    told, waited = _flooded(400, 20_000_000, 4, floods=2)
    assert max(waited) < 5.0 and told["longest_poll"] < 2.0 and told["grown_bytes"] < 50_000_000


@pytest.mark.heavy
@pytest.mark.timeout(1200)
def test_a_flood() -> None:
    """5,000 connections, half of them silent, and 1 GB."""
    told, waited = _flooded(5000, 1_000_000_000, 40, floods=5)
    print(f"ranks waited {max(waited):.2f} s at most; {told}")
    assert max(waited) < 5.0
    assert told["resident_bytes"] < 200_000_000
    assert told["longest_poll"] < 1.0


# IPv6.


def test_the_server_is_found_by_ipv6_too() -> None:
    with ControlServer(2) as server, polled(server):
        addresses = own_addresses()
        assert ControlAddress.parse(server.address()).hosts == tuple(addresses)
        for rank, host in enumerate(["::1" if socket.has_dualstack_ipv6() else "127.0.0.1", "127.0.0.1"]):
            address = ControlAddress.parse(str(ControlAddress(server.launch, (host,), server.port)))
            join(address, server.key, hello(server, rank))[0].close()


ALONE = """
import sys; sys.path.insert(0, ".")
from dstrain.runs.this_machine import own_addresses
from dstrain.supervise.control_server import ControlServer
from tests.support.control_peers import connected, poll
from dstrain.runs.protocol import ControlAddress, Welcome
for only_here in (True, False):
    with ControlServer(1, only_here=only_here) as server:
        print(*ControlAddress.parse(server.address()).hosts)
        with connected(server) as rank:
            rank.hello(0)
            rank.wait_for(Welcome)
"""


@pytest.mark.parametrize("loopback_4", [False, True], ids=["without 127.0.0.1", "with 127.0.0.1"])
def test_a_host_of_ipv6_alone(loopback_4: bool) -> None:
    unshare, ip = shutil.which("unshare"), shutil.which("ip", path="/usr/sbin:/sbin:/usr/bin:/bin")
    commands = ["set -e", f"{ip} link set lo up"]
    commands += [] if loopback_4 else [f"{ip} addr del 127.0.0.1/8 dev lo"]
    commands += [f"{ip} addr add fd00::2/64 dev lo nodad"]
    tried = subprocess.run([unshare or "unshare", "-rn", "true"], capture_output=True) if unshare else None
    if ip is None or tried is None or tried.returncode != 0:
        pytest.skip("network namespaces are not to be had here (iproute2, util-linux, or the right to)")
    done = subprocess.run(
        [unshare, "-rn", "sh", "-c", "; ".join([*commands, 'exec "$@"']), "sh", sys.executable, "-c", ALONE],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    loopback = "127.0.0.1" if loopback_4 else "::1"
    assert done.stdout.splitlines() == [loopback, f"fd00::2 {loopback}"]


def test_networks() -> None:
    same = [
        ("127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"),
        ("10.0.0.1", "::ffff:10.0.0.1"),
        ("fd00::2", "fd00::ffff:2"),
        ("fe80::1%lo", "fe80::2%lo"),
    ]
    networks = [{control_server._network(host) for host in group} for group in same]
    assert all(len(found) == 1 for found in networks) and len(set.union(*networks)) == len(same)
