"""The messages between supervisor and ranks: what goes out comes in, and nothing else does any harm."""

from __future__ import annotations

import dataclasses
import hmac
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dstrain.runs.channel import OPENING_BYTES, PROOF_BYTES, RECORD_EXTRA_BYTES
from dstrain.runs.control_key import KEY, new_key
from dstrain.runs.protocol import (
    ADDRESS,
    MAX_HELLO_BYTES,
    MAX_RANK_MESSAGE_BYTES,
    MAX_SUPERVISOR_MESSAGE_BYTES,
    Busy,
    ControlAddress,
    DumpStacks,
    Hello,
    LocalRank,
    Message,
    MessageReader,
    Orphaned,
    ProtocolError,
    RankKilled,
    RankOutOfMemory,
    RankResumed,
    RankStatus,
    RankStopped,
    Stacks,
    Status,
    Step,
    Stop,
    Welcome,
    decode,
    encode,
    parse_status,
    plan_digest,
    status_text,
)
from dstrain.runs.run_folder import RunFolder
from dstrain.runs.this_machine import own_addresses
from dstrain.supervise import control_server
from dstrain.supervise.control_server import ControlServer
from dstrain.supervise.silent_ranks import kill_commands
from tests.support.control_peers import FakeRank, FakeSupervisor, connected, poll, sealed

ROOT = Path(__file__).resolve().parents[2]

RANKS, PIDS = st.integers(0, 2**20 - 1), st.integers(1, 2**22)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
NAMES = TEXT.filter(bool)
STATUSES = st.builds(
    RankStatus,
    rank=RANKS,
    host=NAMES,
    pid=PIDS,
    state=st.sampled_from(["running", "done", "stopped", "failed"]),
    step=st.integers(0, 2**53 - 1),
    error=st.none() | TEXT,
    time=st.floats(0, 1e12),
)
MESSAGES: dict[type[Message], st.SearchStrategy[Any]] = {
    Hello: st.builds(Hello, NAMES, STATUSES, st.none() | TEXT.map(plan_digest)),
    Status: st.builds(Status, STATUSES, TEXT),
    Step: st.builds(Step, st.integers(0, 2**53 - 1)),
    Busy: st.builds(Busy, st.none() | NAMES),
    Stacks: st.builds(Stacks, TEXT),
    Orphaned: st.just(Orphaned()),
    RankStopped: st.builds(RankStopped, RANKS),
    RankResumed: st.builds(RankResumed, RANKS),
    RankKilled: st.builds(RankKilled, RANKS, st.integers(1, 64)),
    RankOutOfMemory: st.builds(RankOutOfMemory, RANKS, TEXT),
    Welcome: st.builds(Welcome, st.none() | TEXT),
    LocalRank: st.builds(LocalRank, RANKS, PIDS),
    Stop: st.just(Stop()),
    DumpStacks: st.just(DumpStacks()),
}
ANY_MESSAGE = st.one_of(*MESSAGES.values())
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)

RUNNING = RankStatus(0, "n1", 7, "running")
NO_MESSAGES = {
    "empty": b"",
    "another protocol": b"GET / HTTP/1.1\r",
    "no JSON": b"{",
    "bytes": b"\xff\xfe\x00",
    "deep list": b"[" * 100_000,
    "deep object": b'{"type":' * 100_000,
    "deep value": b'{"type":"step","step":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "long number": b"9" * 6000,
    "long number inside": b'{"type":"step","step":' + b"9" * 6000 + b"}",
    "list": b"[]",
    "number": b"1",
    "null": b"null",
    "text": b'"stop"',
    "no type": b"{}",
    "type of another type": b'{"type":["stop"]}',
    "unknown type": b'{"type":"execute"}',
    "surplus key": b'{"type":"stop","at":1}',
    "missing key": b'{"type":"step"}',
    "text for a number": b'{"type":"step","step":"1"}',
    "fraction for a number": b'{"type":"step","step":1.0}',
    "truth for a number": b'{"type":"step","step":true}',
    "not a number": b'{"type":"step","step":NaN}',
    "negative step": b'{"type":"step","step":-1}',
    "huge step": b'{"type":"step","step":9007199254740992}',
    "negative rank": b'{"type":"rank-stopped","rank":-1}',
    "huge rank": b'{"type":"rank-stopped","rank":1048576}',
    "a list of ranks": b'{"type":"rank-stopped","rank":[0]}',
    "no signal": b'{"type":"rank-killed","rank":0,"signal":0}',
    "unknown signal": b'{"type":"rank-killed","rank":0,"signal":65}',
    "long activity": b'{"type":"busy","activity":"' + b"x" * 256 + b'"}',
    "half a character": b'{"type":"busy","activity":"\\ud800"}',
    "no process": b'{"type":"local-rank","rank":0,"pid":0}',
    "all processes": b'{"type":"local-rank","rank":0,"pid":-1}',
    "words for a process": b'{"type":"local-rank","rank":0,"pid":"1; reboot"}',
    "many surplus keys": b'{"type":"stop",' + b",".join(b'"%d":1' % key for key in range(50_000)) + b"}",
    "digest": b'{"type":"hello","launch":"x","status":{"rank":0,"host":"n","pid":1,"state":"done"},"plan_digest":"x"}',
    **{
        f"status: {name}": b'{"type":"status","status":' + json.dumps(status).encode() + b"}"
        for name, status in {
            "list": [],
            "words for a process": dataclasses.asdict(RUNNING) | {"pid": "1; reboot"},
            "huge process": dataclasses.asdict(RUNNING) | {"pid": 2**22 + 1},
            "no host": dataclasses.asdict(RUNNING) | {"host": ""},
            "long host": dataclasses.asdict(RUNNING) | {"host": "h" * 256},
            "state": dataclasses.asdict(RUNNING) | {"state": "fine"},
            "error": dataclasses.asdict(RUNNING) | {"error": ["x"]},
            "long error": dataclasses.asdict(RUNNING) | {"error": "x" * 16_001},
            "infinite time": dataclasses.asdict(RUNNING) | {"time": float("inf")},
            "negative time": dataclasses.asdict(RUNNING) | {"time": -1},
            "surplus key": dataclasses.asdict(RUNNING) | {"user": "root"},
        }.items()
    },
}


def test_every_message_is_tried() -> None:
    assert set(MESSAGES) == set(get_args(Message))
    assert len({message.__dataclass_fields__["type"].default for message in MESSAGES}) == len(MESSAGES)


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_round_trip(kind: type[Message], data: st.DataObject) -> None:
    message = data.draw(MESSAGES[kind])
    line = encode(message)
    assert line.endswith(b"\n") and line.count(b"\n") == 1
    assert decode(line) == message
    assert type(decode(line)) is kind


def test_the_words_on_the_wire() -> None:
    """Of these two ends one may be older than the other by a dstrain or two."""
    assert encode(Step(3)) == b'{"step":3,"type":"step"}\n'
    assert decode(b'{"type": "welcome"}') == Welcome(None)
    status = {"rank": 0, "host": "n1", "pid": 7, "state": "running"}
    assert decode(json.dumps({"type": "hello", "launch": "x", "status": status}).encode()) == Hello(
        "x", RUNNING
    )


@pytest.mark.parametrize("line", NO_MESSAGES.values(), ids=list(NO_MESSAGES))
def test_no_message(line: bytes) -> None:
    with pytest.raises(ProtocolError) as raised:
        decode(line)
    assert 0 < len(str(raised.value)) < 1000


@settings(deadline=None, max_examples=300)
@given(line=st.binary() | JSON_VALUES.map(lambda value: json.dumps(value).encode()))
@example(b"[" * 100_000)
def test_whatever_comes_is_a_message_or_a_protocol_error(line: bytes) -> None:
    with suppress(ProtocolError):
        decode(line)


@settings(deadline=None, max_examples=300)
@given(message=ANY_MESSAGE, data=st.data())
def test_a_message_with_a_fault_is_a_message_or_a_protocol_error(
    message: Message, data: st.DataObject
) -> None:
    """One value of it is another one, or some of its bytes are."""
    record = json.loads(encode(message))
    inner = data.draw(
        st.sampled_from([record, *(value for value in record.values() if isinstance(value, dict))])
    )
    inner[data.draw(st.sampled_from([*inner, "another"]))] = data.draw(JSON_VALUES)
    line = bytearray(json.dumps(record).encode())
    for _ in range(data.draw(st.integers(0, 2))):
        place = data.draw(st.integers(0, len(line)))
        line[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    with suppress(ProtocolError):
        decoded = decode(bytes(line))
        assert decode(encode(decoded)) == decoded


@settings(deadline=None, max_examples=50)
@given(text=st.text(st.characters()), times=st.sampled_from([1, 10, 3000]))
def test_a_text_can_always_be_sent(text: str, times: int) -> None:
    """However long it is, and whatever Python has read from a disk: a rank that fails says why."""
    text = (text or "x") * times
    failed = dataclasses.replace(RUNNING, state="failed", error=text, host=text)
    for message in (Status(failed, text), Stacks(text), Busy(text), RankOutOfMemory(0, text)):
        assert type(decode(encode(message))) is type(message)
    assert parse_status(status_text(failed).encode()).state == "failed"


@pytest.mark.parametrize("text", ["\x01", "\n", "ü", "𝄞"])
def test_the_longest_messages_are_within_what_the_other_side_takes(text: str) -> None:
    most = text * 2**18
    hello = encode(Hello(most, dataclasses.replace(RUNNING, host=most), "0" * 64))
    assert OPENING_BYTES + PROOF_BYTES + RECORD_EXTRA_BYTES + len(hello) < MAX_HELLO_BYTES
    failed = dataclasses.replace(RUNNING, error=most)
    for message in (Status(failed, most), Stacks(most), Busy(most), RankOutOfMemory(0, most)):
        assert len(encode(message)) <= MAX_RANK_MESSAGE_BYTES


def test_what_is_cut_of_a_text() -> None:
    error = decode(encode(Status(dataclasses.replace(RUNNING, error="a" * 16_000 + "b"))))
    assert isinstance(error, Status) and error.status.error == "a" * 15_997 + "..."
    stacks = decode(encode(Stacks("a" * 2**17 + "the main thread")))
    assert (
        isinstance(stacks, Stacks)
        and stacks.text.startswith("...a")
        and stacks.text.endswith("the main thread")
    )
    assert len(stacks.text) == 2**17


@settings(deadline=None, max_examples=100)
@given(messages=st.lists(ANY_MESSAGE, max_size=6), data=st.data())
def test_messages_come_in_pieces_of_any_length(messages: list[Message], data: st.DataObject) -> None:
    stream = b"".join(map(encode, messages))
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=8).map(sorted))
    reader, found = MessageReader(MAX_SUPERVISOR_MESSAGE_BYTES), []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        reader.feed(stream[start:end])
        while (message := reader.next_message()) is not None:
            found.append(message)
    assert found == messages


def test_a_message_is_bounded_before_its_end_has_come() -> None:
    reader = MessageReader(100)
    reader.feed(encode(Stop()) + b"x" * 100)
    assert reader.next_message() == Stop(), "what came before is still a message"
    assert reader.next_message() is None
    reader.feed(b"x")
    with pytest.raises(ProtocolError, match="more than 100 bytes"):
        reader.next_message()
    reader = MessageReader(100)
    reader.feed(b" " * 101 + encode(Stop()))
    with pytest.raises(ProtocolError):
        reader.next_message()


@given(
    launch=st.from_regex("[0-9a-f]{16}", fullmatch=True),
    hosts=st.lists(st.ip_addresses().map(str) | st.just("node-1.example"), min_size=1, max_size=4).map(tuple),
    port=st.integers(1, 65535),
)
def test_an_address_round_trip(launch: str, hosts: tuple[str, ...], port: int) -> None:
    address = ControlAddress(launch, hosts, port)
    assert ControlAddress.parse(str(address)) == address


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "x@",
        "x@y",
        "@y:1",
        "x@:1",
        "x@y:",
        "x@y:0",
        "x@y:65536",
        "x@y:a",
        "x@y:²",
        "x@::1:1",
        "x@[::1:1",
        "x@[::1]",
        "x@[1.2.3.4]:1",
        "x@[fe80::1%eth0]:1",
        "x@fe80::1%eth0:1",
        "x@y,,z:1",
        "x@-oProxyCommand=x:1",
        "x@y z:1",
        "x@y\n:1",
        "x@y:1\n",
        "x@$(id):1",
        "x\n@y:1",
        "x@y:" + "9" * 6000,
    ],
)
def test_no_address(text: str) -> None:
    with pytest.raises(ProtocolError):
        ControlAddress.parse(text)


def test_a_status_in_a_file(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.make("umask")
    folder.write_status(RUNNING)
    written = folder.read_status(0)
    assert written is not None and dataclasses.replace(written, time=0.0) == RUNNING
    record = json.loads(folder.rank_status(0).read_text())
    folder.rank_status(0).write_text(json.dumps(record | {"of a later dstrain": 1}))
    assert folder.read_status(0) == written
    for text in ("", "{", "[]", "[" * 100_000, json.dumps(record | {"pid": "../../etc"}), "\udcff"):
        folder.rank_status(0).write_bytes(text.encode(errors="surrogateescape"))
        assert folder.read_status(0) is None


def test_only_numbers_and_hosts_of_the_plan_reach_a_shell(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "it's here")
    commands = kill_commands({0: 11, 2: 33, 3: 44, 4: 55, -1: 66}, ["n1", "n1", "n2", "n2"], folder)
    assert set(commands) == {"n1", "n2"}, "rank 4 and rank -1 are on no host"
    assert "for p in 11; do" in commands["n1"] and "for p in 33 44; do" in commands["n2"]
    assert kill_commands({0: 11}, [], folder) == {}
    with pytest.raises(ValueError):
        kill_commands({0: "1; touch /tmp/x"}, ["n1"], folder)  # type: ignore[dict-item]
    # The shell of the host, on processes of this one: the right folder among its arguments, and a wrong one.
    ours, other = (
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", argument])
        for argument in (str(folder.path), str(folder.path) + "2")
    )
    try:
        [command] = kill_commands({0: ours.pid, 1: other.pid}, ["n1", "n1"], folder).values()
        subprocess.run(["sh", "-c", command], stderr=subprocess.DEVNULL, timeout=20)
        assert ours.wait(10) == -signal.SIGKILL
        assert other.poll() is None
    finally:
        ours.kill(), other.kill()
        ours.wait(), other.wait()


# The supervisor's side.


@pytest.fixture
def server() -> Iterator[ControlServer]:
    with ControlServer(1000) as server:
        yield server


@pytest.fixture
def witness(server: ControlServer) -> Iterator[FakeRank]:
    """Rank 0 on n1, whom nothing that others do may touch."""
    with connected(server) as rank:
        rank.hello(0)
        rank.wait_for(Welcome)
        yield rank


def garbage() -> dict[str, bytes]:
    lines = {name: line + b"\n" for name, line in NO_MESSAGES.items()}
    return lines | {"no end": b"x" * 3_000_000, "long line": b"[" + b"1," * 1_500_000 + b"1]\n"}


def test_a_stranger_with_garbage_loses_his_connection_and_nobody_else_does(
    server: ControlServer, witness: FakeRank
) -> None:
    for step, (content, greet) in enumerate(itertools.product(garbage().values(), (False, True))):
        with connected(server, greet=greet) as stranger:
            (stranger.send if greet else stranger.send_raw)(content)
            stranger.wait_for_the_end()
        witness.serves(0, step + 1)
    assert set(server.ranks) == {0}
    assert server.ranks[0].lost_at is None


def test_a_rank_with_garbage_loses_its_connection_and_nobody_else_does(
    server: ControlServer, witness: FakeRank
) -> None:
    for number, content in enumerate(garbage().values(), start=1):
        with connected(server) as bad:
            bad.hello(number)
            bad.wait_for(Welcome)
            bad.send(encode(Step(5)) + content)
            bad.wait_for_the_end()
        assert server.ranks[number].step == 5, "what came before it counts"
        assert server.ranks[number].lost_at is not None
        witness.serves(0, number)


def test_who_is_admitted(server: ControlServer, witness: FakeRank) -> None:
    hello = Hello(server.launch, dataclasses.replace(RUNNING, rank=1))
    refused = {
        "another launch": dataclasses.replace(hello, launch="another"),
        "no ASCII": dataclasses.replace(hello, launch="ü"),
        "no such rank": dataclasses.replace(hello, status=dataclasses.replace(RUNNING, rank=1000)),
        "a rank that is here": dataclasses.replace(hello, status=RUNNING),
        "no hello": Step(1),
        "a message of the supervisor": Stop(),
        "too long": dataclasses.replace(
            hello, status=dataclasses.replace(RUNNING, rank=1, error="x" * MAX_HELLO_BYTES)
        ),
    }
    for step, message in enumerate(refused.values()):
        with connected(server) as stranger:
            stranger.send(encode(message))
            stranger.wait_for_the_end()
        witness.serves(0, step + 1)
    assert set(server.ranks) == {0}
    with connected(server) as rank:
        rank.send(encode(hello))
        rank.wait_for(Welcome)
    poll(server, lambda: server.ranks[1].lost_at is not None)
    assert not server.ranks[1].by_silence
    with connected(server) as again:
        again.send(encode(hello))
        again.wait_for_the_end()


def test_a_rank_says_only_what_it_may(server: ControlServer, witness: FakeRank) -> None:
    with connected(server) as elsewhere:
        elsewhere.hello(999, host="n2")
        elsewhere.wait_for(Welcome)
        status = RankStatus(1, "n1", 101, "failed")
        refused: list[Callable[[int], Message]] = [
            lambda own: Hello(server.launch, dataclasses.replace(status, rank=own)),
            lambda own: Status(dataclasses.replace(status, rank=0, pid=100)),
            lambda own: Status(dataclasses.replace(status, rank=own, pid=1)),
            lambda own: Status(dataclasses.replace(status, rank=own, pid=100 + own, host="n2")),
            lambda own: RankStopped(own),
            lambda own: RankStopped(998),  # has not come yet
            lambda own: RankResumed(999),  # on another host
            lambda own: RankKilled(999, 9),
            lambda own: RankOutOfMemory(999, "x"),
            lambda own: Welcome(),
            lambda own: LocalRank(0, 100),
            lambda own: Stop(),
            lambda own: DumpStacks(),
        ]
        for own, message in enumerate(refused, start=1):
            with connected(server) as bad:
                bad.hello(own)
                bad.wait_for(Welcome)
                bad.send(encode(message(own)))
                bad.wait_for_the_end()
            witness.serves(0, own)
        elsewhere.serves(999, 1)
    known = server.ranks[999]
    assert (known.stopped_at, known.killed_by, known.out_of_memory) == (None, None, None)
    assert server.ranks[0].status.state == "running"


def test_what_a_rank_says_is_known(server: ControlServer, witness: FakeRank) -> None:
    with connected(server) as rank:
        rank.hello(1)
        assert rank.wait_for(LocalRank) == LocalRank(0, 100)
        assert witness.wait_for(LocalRank) == LocalRank(1, 101)
        own, other = server.ranks[1], server.ranks[0]
        for message, seen in (
            (Busy("checkpoint"), lambda: own.busy == "checkpoint"),
            (Busy(None), lambda: own.busy is None),
            (Stacks("here"), lambda: own.stacks == "here"),
            (Orphaned(), lambda: own.orphaned_at is not None),
            (RankStopped(0), lambda: other.stopped_at is not None),
            (RankResumed(0), lambda: other.stopped_at is None),
            (RankKilled(0, 9), lambda: other.killed_by == 9),
            (RankOutOfMemory(0, "words"), lambda: other.out_of_memory == "words"),
            (
                Status(RankStatus(1, "n1", 101, "failed", 3, "why"), "the\nend"),
                lambda: own.status.error == "why",
            ),
        ):
            rank.send(encode(message))
            poll(server, seen)
        assert own.log_tail == "the\nend"
        assert abs(own.status.time - time.time()) < 60, "by this machine's clock"


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sent=st.lists(ANY_MESSAGE.map(encode) | st.binary(max_size=20).map(lambda raw: raw + b"\n"), max_size=5)
)
def test_whatever_a_rank_sends_ends_nobody_else(
    server: ControlServer, witness: FakeRank, sent: list[bytes]
) -> None:
    number = len(server.ranks)
    with connected(server) as rank:
        rank.hello(number)
        rank.wait_for(Welcome)
        rank.send(b"".join(sent))
    poll(server, lambda: server.ranks[number].lost_at is not None)
    witness.serves(0, number)


def test_a_plan_is_sent_as_it_is_or_not_at_all() -> None:
    plan = json.dumps({"name": "ü", "values": list(range(100_000))}, indent=2)
    with ControlServer(3, plan) as server:
        for rank, (seen, sent) in enumerate(
            [(plan_digest(plan), None), (None, plan), (plan_digest("x"), plan)]
        ):
            with connected(server) as fake:
                fake.send(encode(Hello(server.launch, RankStatus(rank, "n1", 1, "running"), seen)))
                assert fake.wait_for(Welcome) == Welcome(sent)
    for unsendable in ("x" * (MAX_SUPERVISOR_MESSAGE_BYTES // 6), "\udcff"):
        with pytest.raises(ValueError, match="too long to be sent"):
            ControlServer(1, unsendable)


def test_a_stranger_has_seconds_to_say_who_he_is(
    server: ControlServer, witness: FakeRank, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_server, "HELLO_SECONDS", 0.5)
    with connected(server, greet=False) as stranger:
        begun = time.monotonic()
        stranger.send_raw(b"dstr")
        stranger.wait_for_the_end()
        assert 0.4 < time.monotonic() - begun < 10
    witness.serves(0, 1)
    assert server.ranks[0].lost_at is None, "who has said so may be quiet"


def test_a_hello_that_waits_while_the_supervisor_is_stopped_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_server, "HELLO_SECONDS", 0.3)
    with ControlServer(1) as server, connected(server) as rank:
        rank.connection.sendall(sealed(rank.channel, encode(Hello(server.launch, RUNNING))))
        time.sleep(0.5)  # Ctrl-Z, and `fg`
        rank.wait_for(Welcome)


def test_ranks_are_admitted_in_a_flood_of_strangers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_server, "_MAX_STRANGERS", 20)
    with ControlServer(2) as server:
        flood: list[socket.socket] = []
        try:
            for number, polled in enumerate((True, False)):
                for _ in range(300 if polled else 0):
                    flood.append(socket.create_connection(("127.0.0.1", server.port), timeout=10))
                    server.poll()
                    assert sum(map(len, server._strangers.values())) <= 22
                rank = FakeRank(server, greet=False)
                flood.append(rank.connection)
                if not polled:  # it is looked at with all of these, which are enough to push it out
                    rank.connection.sendall(rank.channel.take_handshake())
                    for _ in range(30):
                        flood.append(socket.create_connection(("127.0.0.1", server.port), timeout=10))
                rank.greet()
                rank.hello(number)
                rank.wait_for(Welcome)
            assert {rank: known.lost_at for rank, known in server.ranks.items()} == {0: None, 1: None}
        finally:
            for connection in flood:
                connection.close()


def test_a_flood_from_one_network_pushes_out_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_server, "_MAX_STRANGERS", 20)
    [*others, _] = [address for address in own_addresses() if ":" not in address]
    if not others:
        pytest.skip("this machine has no address but loopback")
    with (
        ControlServer(1) as server,
        connected(server, greet=False) as slow,
    ):  # by loopback; its first bytes are late
        flood = []
        try:
            for _ in range(60):
                flood.append(socket.create_connection((others[0], server.port), timeout=10))
                server.poll()
            slow.greet()
            slow.hello(0)
            slow.wait_for(Welcome)
        finally:
            for connection in flood:
                connection.close()


# The rank's side.

LAUNCH_KEY = new_key()
RANK = """
import os, sys, time
from dstrain.runs.control_key import KEY
from dstrain.runs.protocol import RankStatus
from dstrain.train import control_connection
from dstrain.train.control_client import ControlClient
control_connection._RETRY_SECONDS = {retry_seconds}
status = RankStatus(int(sys.argv[1]), "n1", os.getpid(), "running")
control = ControlClient(os.environ, status, key=bytes.fromhex(os.environ[KEY]))
print("connected", flush=True)
{work}
time.sleep(120)
"""


@contextmanager
def ranks(
    listener: socket.socket, count: int, work: str = "", retry_seconds: float = 15.0
) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that connect to ``listener``, and wait for ever."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        ADDRESS: str(ControlAddress("launch", ("127.0.0.1",), listener.getsockname()[1])),
        KEY: LAUNCH_KEY.hex(),
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-c", RANK.format(work=work, retry_seconds=retry_seconds), str(number)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def accept(listener: socket.socket) -> tuple[FakeSupervisor, int]:
    """A rank that has connected and said hello, and its number."""
    supervisor = FakeSupervisor(listener.accept()[0], LAUNCH_KEY, "launch")
    hello = supervisor.next_message()
    assert isinstance(hello, Hello) and hello.launch == "launch"
    return supervisor, hello.status.rank


def test_a_rank_ends_when_its_supervisor_sends_garbage() -> None:
    sent = {
        name: NO_MESSAGES[name]
        for name in ("empty", "deep list", "list", "long number", "words for a process")
    }
    sent |= {"a message of a rank": encode(Step(1)).strip(), "a second welcome": encode(Welcome()).strip()}
    with socket.create_server(("127.0.0.1", 0)) as listener, ranks(listener, len(sent)) as processes:
        for content in sent.values():
            supervisor, number = accept(listener)
            supervisor.send(encode(Welcome()))
            assert processes[number].stdout.readline() == "connected\n"  # type: ignore[union-attr]
            supervisor.send(encode(LocalRank(0, 1)) + content + b"\n")
            assert processes[number].wait(20) == 1
            assert "this rank ends: the supervisor sent an invalid message (" in (
                processes[number].stderr.read()  # type: ignore[union-attr]
            )
            supervisor.connection.close()


def test_a_rank_does_not_begin_with_garbage() -> None:
    sent = {name: NO_MESSAGES[name] + b"\n" for name in ("another protocol", "deep object", "number")}
    sent |= {"no welcome": encode(Stop())}
    with socket.create_server(("127.0.0.1", 0)) as listener, ranks(listener, len(sent)) as processes:
        for content in sent.values():
            supervisor, number = accept(listener)
            supervisor.send(content)
            assert processes[number].wait(20) == 1
            assert "DstrainError: the supervisor sent" in processes[number].stderr.read()  # type: ignore[union-attr]
            supervisor.connection.close()


def test_a_rank_does_not_believe_what_can_not_prove_to_be_its_supervisor() -> None:
    """Whatever that sends; and it comes again, until the right one is there."""
    stranger = new_key()

    def wrong_key(opening: bytes) -> bytes:
        nonces = opening[8:40], bytes(32)
        return nonces[1] + hmac.digest(stranger, b"".join(nonces), "sha256")

    answers: list[Callable[[bytes], bytes]] = [
        lambda opening: encode(Welcome("a false plan")) * 10,
        lambda opening: opening,  # the challenge, reflected
        lambda opening: opening[8:],
        lambda opening: bytes(64),
        wrong_key,
        lambda opening: b"",
    ]
    with socket.create_server(("127.0.0.1", 0)) as listener, ranks(listener, 1) as [process]:
        for answer in answers:
            connection, _ = listener.accept()
            connection.settimeout(20)
            connection.sendall(answer(connection.recv(4096)))
            if answer is answers[-1]:
                connection.shutdown(socket.SHUT_WR)
            assert connection.recv(4096) == b"", "it says nothing more"
            connection.close()
        supervisor, _ = accept(listener)
        supervisor.send(encode(Welcome()))
        assert process.stdout.readline() == "connected\n"  # type: ignore[union-attr]
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        ranks(listener, 1, retry_seconds=0.5) as [process],
    ):
        listener.settimeout(0.2)
        while process.poll() is None:
            with suppress(TimeoutError):
                connection, _ = listener.accept()
                with connection, suppress(OSError):
                    connection.settimeout(20)
                    connection.sendall(wrong_key(connection.recv(4096)))
                    connection.recv(1)
        said = process.stderr.read()  # type: ignore[union-attr]
        assert process.returncode == 1
        assert (
            "proves to be this run's supervisor (127.0.0.1: it does not know the key of this launch" in said
        )


def test_a_rank_does_not_outlive_its_listener() -> None:
    """Whatever it dies of."""
    work = "control._look_around = lambda: 1 // 0"
    with socket.create_server(("127.0.0.1", 0)) as listener, ranks(listener, 1, work) as [process]:
        supervisor, _ = accept(listener)
        supervisor.send(encode(Welcome()))
        assert process.wait(20) == 1
        assert "it can't listen to the supervisor any more (ZeroDivisionError: " in process.stderr.read()  # type: ignore[union-attr]
        supervisor.connection.close()
