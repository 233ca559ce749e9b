"""Ranks connected to the supervisor: real processes and sockets, no torch."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dstrain.runs.protocol import ADDRESS, WAITING_FOR_DATA, WAITS_FOR, RankStatus, Stop, Welcome
from dstrain.runs.run_folder import RunFolder
from dstrain.runs.this_machine import own_addresses
from dstrain.supervise.control_server import ControlServer, RankConnection
from dstrain.supervise.hang_detection import (
    BUSY_SECONDS,
    LEAST_SECONDS,
    STOPPED_SECONDS,
    HangWatch,
    Progress,
    where_it_stands,
)
from tests.support.control_peers import connected
from tests.unit.test_launch_supervisor import ROOT, TWO_RANKS, Fake

# A rank of a host that the supervisor can't look at: only its connection tells of it.
FAR = """
from dataclasses import replace
from dstrain.train.control_client import ControlClient
status = RankStatus(rank, "n2", os.getpid(), "running")
control = ControlClient(os.environ, status, key=bytes.fromhex(os.environ[KEY]))
def report(state, tail="", **values):
    control.send_status(replace(status, state=state, **values), tail); control.close()
def steps(numbers, seconds=0.6):
    for step in numbers:
        time.sleep(seconds); control.step_ended(step)
"""


@pytest.fixture
def fake(tmp_path: Path):
    fake = Fake(tmp_path)
    yield fake
    assert fake.left() == []


def test_a_far_rank_that_dies_is_known_at_once(fake: Fake) -> None:
    rank = FAR + "time.sleep(0.5); os.kill(os.getpid(), 9) if rank == 1 else time.sleep(300)"
    launcher = TWO_RANKS.replace(
        "while any", "while True: time.sleep(1)\nwhile any"
    )  # it never says which rank died
    started = time.monotonic()
    outcome = fake.run(launcher, rank, settle_seconds=3.0, grace_seconds=1.0)
    assert time.monotonic() - started < 15
    assert outcome.cause is not None
    assert (outcome.cause.rank, outcome.cause.host) == (1, "n2")
    # The launcher never collects it, so its neighbour sees what it died of.
    assert outcome.cause.reason == "killed by SIGKILL (probably out of memory)"


def test_a_rank_that_was_lost_comes_before_those_that_lost_it(fake: Fake) -> None:
    """Whichever comes first: here the other one's word is there before the connection has ended."""
    rank = (
        FAR
        + """
if rank == 0:
    time.sleep(1)
    report("failed", error="RuntimeError: Connection closed by peer [10.0.0.2]:1"); sys.exit(1)
time.sleep(1.4); os._exit(9)
"""
    )
    outcome = fake.run(TWO_RANKS, rank)
    assert outcome.cause is not None
    assert (outcome.cause.rank, outcome.cause.host) == (1, "n2")
    assert "ended without a message" in outcome.cause.reason


def test_ranks_notice_the_end_of_their_launcher(fake: Fake) -> None:
    """That of a host whose processes the guard does not see; what started it lives on."""
    launcher = f"""
if len(sys.argv) == 3:
    node = subprocess.Popen([sys.executable, __file__, *sys.argv[1:], "node"])
    while sum(name.startswith("met-") for name in os.listdir(sys.argv[1])) < 2: time.sleep(0.05)
    node.kill(); time.sleep(300)
{TWO_RANKS}
"""
    started = time.monotonic()
    outcome = fake.run(
        launcher,
        FAR + "open(os.path.join(sys.argv[1], f'met-{rank}'), 'w'); time.sleep(300)",
        settle_seconds=0.5,
        grace_seconds=1.0,
    )
    assert time.monotonic() - started < 20
    assert outcome.cause is not None
    assert (outcome.cause.rank, outcome.cause.host) == (None, "n2")
    assert outcome.cause.reason == "the launcher on n2 ended before its ranks (killed?)"


def test_a_word_of_failure_needs_no_shared_disk(fake: Fake) -> None:
    rank = (
        FAR
        + """
if rank == 1:
    report("failed", "its last line", error="ValueError: loss is nan"); sys.exit(1)
time.sleep(300)
"""
    )
    outcome = fake.run(TWO_RANKS, rank)
    assert outcome.cause is not None
    assert (outcome.cause.rank, outcome.cause.reason) == (1, "ValueError: loss is nan")
    assert outcome.cause.log_tail == ["its last line"]


def test_done_needs_no_shared_disk(fake: Fake) -> None:
    rank = FAR + "report('done')"
    assert fake.run(TWO_RANKS, rank).ok


def test_a_rank_ends_with_its_connection(fake: Fake) -> None:
    """The launcher can't be told to end: the ranks go by themselves."""
    rank = (
        FAR + "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(0.3 if rank else 300); sys.exit(3)"
    )
    outcome = fake.run("signal.signal(signal.SIGTERM, signal.SIG_IGN)" + TWO_RANKS, rank, terminate=False)
    assert not outcome.ok
    assert "this rank ends: the supervisor has ended the run" in fake.folder.launcher_log.read_text()


def test_a_stop_is_asked_for_over_the_connection(fake: Fake) -> None:
    rank = (
        FAR
        + """
while not control.asked_to_stop:
    time.sleep(0.05)
report("stopped", step=7)
"""
    )
    threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    assert fake.run(TWO_RANKS, rank).stopped_after == 7


def test_a_hang_is_found_and_says_where_ranks_wait(fake: Fake) -> None:
    rank = (
        FAR
        + """
def collective(): time.sleep(300)
steps([1, 2]); collective()
"""
    )
    outcome = fake.run(TWO_RANKS, rank, hang_seconds=5.0)
    assert outcome.cause is not None
    assert "no step for" in outcome.cause.reason
    assert "rank 0 waits in collective (" in outcome.cause.reason
    assert "rank 1 waits in collective (" in outcome.cause.reason
    assert "in collective" in fake.folder.rank_stacks(1).read_text()


def test_a_stopped_rank_is_named(fake: Fake) -> None:
    rank = FAR + "steps([1, 2]); os.kill(os.getpid(), signal.SIGSTOP) if rank == 1 else time.sleep(300)"
    outcome = fake.run(TWO_RANKS, rank, hang_seconds=5.0)
    assert outcome.cause is not None
    assert outcome.cause.rank == 1
    assert "rank 1 on n2 does not answer: stopped (SIGSTOP)" in outcome.cause.reason


def test_slow_steps_are_no_hang(fake: Fake) -> None:
    rank = FAR + "steps([1, 2, 3]); report('done')"
    assert fake.run(TWO_RANKS, rank, hang_seconds=5.0).ok


def test_a_rank_without_supervisor_listens_to_nobody() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        + """
from dstrain.runs.protocol import RankStatus
from dstrain.train.control_client import ControlClient
control = ControlClient({}, RankStatus(0, "n1", 1, "running"))
control.step_ended(1); control.close(); print(control.asked_to_stop)
"""
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_a_rank_that_comes_after_the_wish_to_stop_hears_of_it() -> None:
    with ControlServer(1) as control:
        control.broadcast(Stop())
        with connected(control) as rank:
            rank.hello(0)
            assert rank.wait_for(Welcome) == Welcome()
            assert rank.wait_for(Stop) == Stop()


def test_a_supervisor_that_can_not_be_reached_is_one_error() -> None:
    with ControlServer(1) as gone:
        address = gone.address()
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        + """
import os
from dstrain.runs.protocol import RankStatus
from dstrain.train.control_client import ControlClient
ControlClient(os.environ, RankStatus(0, "n1", 1, "running"), key=bytes(32))
"""
    )
    said = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, ADDRESS: address}, capture_output=True, text=True
    )
    assert "can't reach the supervisor at port" in said.stderr


def test_the_server_is_offered_on_every_address() -> None:
    addresses = own_addresses()
    assert addresses[-1] == "127.0.0.1"
    assert len(set(addresses)) == len(addresses)


def test_ranks_of_this_machine_alone_need_no_network() -> None:
    with ControlServer(1, only_here=True) as control:
        assert control.address() == f"{control.launch}@127.0.0.1:{control.port}"
        for address in own_addresses()[:-1]:
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection((address, control.port), timeout=5)


def test_the_bound_of_a_hang_follows_from_the_slowest_step() -> None:
    with ControlServer(1) as control:
        rank = _rank(control)
        progress = Progress(None)
        assert progress.seconds_without_step(control.ranks, 1e9) is None, (
            "nothing hangs before the first step"
        )
        for step, at in ((1, 100.0), (2, 120.0), (3, 121.0)):
            rank.step, rank.step_at = step, at
            assert progress.seconds_without_step(control.ranks, at + 1) is None
        assert progress.bound == 200.0
        assert progress.seconds_without_step(control.ranks, 320.0) is None
        assert progress.seconds_without_step(control.ranks, 322.0) == 201.0
        rank.busy = "validation loss"
        assert progress.seconds_without_step(control.ranks, 322.0) is None, "it is between two steps"
        assert progress.seconds_without_step(control.ranks, 121.0 + BUSY_SECONDS + 1) == BUSY_SECONDS + 1
        rank.busy, rank.step_at = None, 300.0
        assert progress.seconds_without_step(control.ranks, 499.0) is None, "the next step began at 300"
        rank.step, rank.step_at = 4, 301.0
        assert progress.seconds_without_step(control.ranks, 302.0) is None
        assert progress.bound == 200.0, "what is done between steps is no slow step"
        assert Progress(None).bound == BUSY_SECONDS, "the second step has none to be compared with"


def test_the_first_step_hangs_when_it_waits_for_data() -> None:
    with ControlServer(1) as control:
        rank, progress = _rank(control), Progress(None)
        rank.busy, rank.step_at = WAITING_FOR_DATA, 100.0
        assert progress.seconds_without_step(control.ranks, 100.0 + BUSY_SECONDS) is None
        assert progress.seconds_without_step(control.ranks, 101.0 + BUSY_SECONDS) == BUSY_SECONDS + 1
        assert Progress(30).seconds_without_step(control.ranks, 131.0) == 31.0
        assert Progress(float("inf")).seconds_without_step(control.ranks, 1e9) is None
        rank.busy = "hook mine"
        assert progress.seconds_without_step(control.ranks, 1e9) is None


def test_what_a_rank_waits_for_is_said(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.logs.mkdir()
    with ControlServer(1) as control:
        rank, hang = _rank(control), HangWatch(control, Progress(5), folder)
        rank.step, rank.step_at, rank.busy = 3, time.monotonic() - 10, WAITING_FOR_DATA
        assert hang.look() is None
        rank.stacks = STACKS + f"\n{WAITS_FOR}data, which reads /d/a b.jsonl\n"
        sign = hang.look()
        assert sign is not None and sign.reason.endswith(
            "rank 0 waits for data, which reads /d/a b.jsonl in all_reduce (distributed.py:12) < train (trainer.py:90)"
        )


def test_two_slow_steps_are_no_hang() -> None:
    with ControlServer(1) as control:
        rank, progress = _rank(control), Progress(None)
        rank.step, rank.step_at = 1, 100.0
        assert progress.seconds_without_step(control.ranks, 189.0) is None
        rank.step, rank.step_at = 2, 190.0
        assert progress.seconds_without_step(control.ranks, 191.0) is None
        assert progress.bound == 900.0
        quick = Progress(None)
        for step in (1, 2):
            rank.step, rank.step_at = step, 100.0 + step
            quick.seconds_without_step(control.ranks, 102.0)
        assert quick.bound == LEAST_SECONDS


def test_a_rank_that_is_stopped_is_no_hang_while_we_were_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole run may have been suspended, and goes on."""
    folder = RunFolder(tmp_path)
    folder.logs.mkdir()
    with ControlServer(1) as control:
        rank = _rank(control)
        rank.stopped_at = time.monotonic() - STOPPED_SECONDS - 1
        assert HangWatch(control, Progress(float("inf")), folder).look() is None, "asked for never"
        hang = HangWatch(control, Progress(None), folder)
        assert hang.look() is None, "it asks the others first"
        sign = hang.look()
        assert sign is not None and "rank 0 on n1 does not answer: stopped (SIGSTOP)" in sign.reason
        monkeypatch.setattr("dstrain.supervise.hang_detection._AWAY_SECONDS", 0.0)
        assert hang.look() is None and hang.look() is None


STACKS = """Current thread 0x1 (most recent call first):
  File "/x/control_client.py", line 5 in _stacks

Thread 0x2 (most recent call first):
  File "/lib/torch/distributed.py", line 12 in all_reduce
  File "/x/dstrain/train/trainer.py", line 90 in train
"""


def test_where_it_stands() -> None:
    assert where_it_stands(STACKS) == "all_reduce (distributed.py:12) < train (trainer.py:90)"
    assert where_it_stands("") == "no Python code"


def _rank(control: ControlServer) -> RankConnection:
    return control.ranks.setdefault(0, RankConnection(RankStatus(0, "n1", 1, "running")))


def test_a_console_that_nobody_reads_any_more_is_no_failure(tmp_path: Path) -> None:
    """Rank 0 writes its lines to what ssh carries away."""
    code = f"""
import os, sys; sys.path.insert(0, {str(ROOT)!r})
reader, writer = os.pipe()
os.dup2(writer, 1); os.close(writer)
from pathlib import Path
from dstrain.runs.run_folder import RunFolder
from dstrain.train.worker import _log_to
folder = RunFolder(sys.argv[1])
folder.make("private")
console = _log_to(folder, 0)
console.write("first\\n"); sys.stderr.write(os.read(reader, 100).decode())
os.close(reader)
console.write("second\\n"); console.flush(); sys.stderr.write("fine\\n")
"""
    folder = RunFolder(tmp_path / "run")
    assert subprocess.run([sys.executable, "-c", code, str(folder.path)], timeout=60).returncode == 0
    assert folder.rank_log(0).read_text() == "first\nfine\n"
