"""The supervisor against small fake launchers: real processes and signals, no torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import pytest

from dstrain.errors import RESUMABLE
from dstrain.launch.launchers import find_killed_rank, find_lost_host
from dstrain.launch.launchers.output import KilledRank
from dstrain.runs.control_key import KEY
from dstrain.runs.protocol import ADDRESS, RankStatus
from dstrain.runs.run_folder import RunFolder
from dstrain.supervise.control_server import ControlServer
from dstrain.supervise.failure_cause import Outcome
from dstrain.supervise.supervisor import supervise

ROOT = Path(__file__).resolve().parents[2]

PREAMBLE = f"""
import os, signal, socket, subprocess, sys, time
sys.path.insert(0, {str(ROOT)!r})
from dstrain.runs.control_key import KEY
from dstrain.runs.protocol import ADDRESS, RankStatus
from dstrain.runs.run_folder import RunFolder
folder, mark = RunFolder(sys.argv[1]), sys.argv[2]
def say(rank, state, error=None, pid=None, host=None):
    host = host or socket.gethostname()
    folder.write_status(RankStatus(rank, host, pid or os.getpid(), state, error=error))
"""

# Starts rank 0 and 1 as `RANK` code and behaves like deepspeed.launcher.launch.
TWO_RANKS = """
code = open(__file__ + ".rank").read()
ranks = [subprocess.Popen([sys.executable, "-c", code, sys.argv[1], mark, str(r)]) for r in (0, 1)]
while any(r.poll() is None for r in ranks):
    bad = [r for r in ranks if r.poll() not in (None, 0)]
    if bad:
        time.sleep(1)
        for r in ranks:
            r.terminate()
        for r in ranks:
            r.wait()
        print("[ERROR] x exits with return code =", bad[0].returncode, flush=True)
        sys.exit(bad[0].returncode)
    time.sleep(0.1)
"""


class Fake:
    """Runs a fake launcher under the supervisor, and finds what is left of it by a unique argument."""

    def __init__(self, tmp_path: Path) -> None:
        self.folder = RunFolder(tmp_path / "run")
        self.script = tmp_path / "launcher.py"
        self.mark = uuid.uuid4().hex
        self.ticks = 0

    def command(self, launcher: str, rank: str = "") -> list[str]:
        self.script.write_text(PREAMBLE + launcher)
        Path(f"{self.script}.rank").write_text(PREAMBLE + "rank = int(sys.argv[3])\n" + rank)
        return [sys.executable, str(self.script), str(self.folder.path), self.mark]

    def run(self, launcher: str, rank: str = "", world_size: int = 2, **options: float | bool) -> Outcome:
        def tick() -> None:
            self.ticks += 1

        control = ControlServer(world_size)
        return supervise(
            self.command(launcher, rank),
            environment={"FAKE": "1", ADDRESS: control.address(), KEY: control.key.hex()},
            control=control,
            folder=self.folder,
            world_size=world_size,
            on_tick=tick,
            poll_seconds=0.05,
            **{"settle_seconds": 2.0, **options},
        )

    def left(self) -> list[int]:
        found = []
        for name in os.listdir("/proc"):
            try:
                if name.isdigit() and self.mark.encode() in Path(f"/proc/{name}/cmdline").read_bytes():
                    found.append(int(name))
            except OSError:
                continue
        return found


@pytest.fixture
def fake(tmp_path: Path):
    fake = Fake(tmp_path)
    yield fake
    assert fake.left() == []


def test_all_done(fake: Fake) -> None:
    outcome = fake.run(TWO_RANKS, "say(rank, 'running'); time.sleep(0.3); say(rank, 'done')")
    assert outcome == Outcome(True, 0, None)
    assert fake.ticks > 2


def test_output_and_environment(fake: Fake) -> None:
    fake.folder.logs.mkdir(parents=True)
    fake.folder.launcher_log.write_text("earlier\n")
    launcher = "print(os.environ['FAKE']); print('err', file=sys.stderr); [say(r, 'done') for r in (0, 1)]"
    assert fake.run(launcher).ok
    assert fake.folder.launcher_log.read_text().splitlines()[0] == "earlier"
    assert set(fake.folder.launcher_log.read_text().split()) == {"earlier", "1", "err"}


def test_the_first_failure_is_the_cause(fake: Fake) -> None:
    rank = """
say(rank, "running"); time.sleep(0.3 if rank == 1 else 0.9)
folder.rank_log(rank).write_text(f"log of {rank}\\n")
say(rank, "failed", "ValueError: loss is nan" if rank == 1 else "RuntimeError: closed"); sys.exit(3)
"""
    outcome = fake.run(TWO_RANKS, rank)
    assert (outcome.ok, outcome.exit_code) == (False, 3)
    assert outcome.cause is not None
    assert (outcome.cause.rank, outcome.cause.reason) == (1, "ValueError: loss is nan")
    assert outcome.cause.log_tail == ["log of 1"]


def test_killed_rank_comes_before_those_that_lost_it(fake: Fake) -> None:
    rank = """
say(rank, "running"); time.sleep(0.5)
if rank == 1: os.kill(os.getpid(), signal.SIGKILL)
time.sleep(0.3); say(rank, "failed", "RuntimeError: connection closed"); time.sleep(60)
"""
    started = time.monotonic()
    outcome = fake.run(TWO_RANKS, rank)
    assert time.monotonic() - started < 10
    assert outcome.cause is not None
    assert (outcome.cause.rank, outcome.cause.reason) == (1, "killed by SIGKILL (probably out of memory)")


def test_launcher_that_does_not_notice_a_dead_rank(fake: Fake) -> None:
    launcher = """
rank = subprocess.Popen(["sh", "-c", "sleep 0.5; kill -9 $$", mark])
say(0, "running", pid=rank.pid)
signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(300)
"""
    outcome = fake.run(launcher, world_size=1, settle_seconds=0.5, grace_seconds=0.5)
    assert outcome.cause is not None
    assert (outcome.cause.rank, outcome.exit_code) == (0, 1)
    assert outcome.cause.reason.startswith("killed by SIGKILL")


def test_exit_0_with_a_silent_rank_is_a_failure(fake: Fake) -> None:
    outcome = fake.run("say(0, 'done')", settle_seconds=0.3)
    assert (outcome.ok, outcome.exit_code) == (False, 1)
    assert outcome.cause is not None
    assert (
        outcome.cause.reason
        == "the launcher ended with exit code 0, but rank 1 did not report that it had finished"
    )


def test_a_late_word_counts(fake: Fake) -> None:
    """Over NFS the last word may become visible after the launcher's end."""

    def late() -> None:
        time.sleep(1)
        fake.folder.write_status(RankStatus(1, "n2", 1, "done"))

    threading.Timer(0, late).start()
    assert fake.run("say(0, 'done')", settle_seconds=10).ok


def test_words_of_an_earlier_launch_do_not_count(fake: Fake) -> None:
    fake.folder.make("umask")
    for rank in (0, 1):
        fake.folder.write_status(RankStatus(rank, "n1", 1, "done"))
    assert not fake.run("", settle_seconds=0.1).ok


def test_all_done_but_the_launcher_failed(fake: Fake) -> None:
    outcome = fake.run("[say(r, 'done') for r in (0, 1)]; sys.exit(7)")
    assert outcome.cause is not None
    assert (outcome.ok, outcome.exit_code, outcome.cause.rank) == (False, 7, None)


def test_launcher_that_dies_before_any_rank_speaks(fake: Fake) -> None:
    outcome = fake.run("print('before'); raise ValueError('bad hostfile')")
    assert outcome.cause is not None
    assert outcome.cause.reason == (
        "the launcher ended with exit code 1 before any rank reported: ValueError: bad hostfile"
    )
    assert outcome.cause.log_tail[-1] == "ValueError: bad hostfile"


def test_launcher_that_can_not_be_started(fake: Fake) -> None:
    outcome = supervise(
        ["/no/such/launcher"],
        environment={},
        folder=fake.folder,
        control=ControlServer(1),
        world_size=1,
        on_tick=lambda: None,
    )
    assert outcome.exit_code == 127
    assert outcome.cause is not None
    assert "/no/such/launcher can't be started: No such file or directory" in outcome.cause.reason


def test_killed_rank_of_another_host(fake: Fake) -> None:
    launcher = """
say(0, "running", host="n1", pid=1); say(1, "running", host="n2", pid=1); time.sleep(0.2)
say(0, "failed", "RuntimeError: connection closed", host="n1", pid=1)
print("n2: [ERROR] [launch.py:325] ['python'] exits with return code = -9"); sys.exit(1)
"""
    outcome = fake.run(launcher)
    assert outcome.cause is not None
    assert (outcome.cause.rank, outcome.cause.host) == (1, "n2")
    assert outcome.cause.reason == "killed by SIGKILL (probably out of memory)"


@pytest.mark.parametrize("last_word", ["", "say(0, 'failed', 'Connection reset by peer')"])
def test_a_lost_host_ends_the_run(fake: Fake, last_word: str) -> None:
    launcher = f"""
say(0, "running"); say(1, "running", pid=1, host="node2")
print("node1: step 1", flush=True)
print("pdsh@node1: node2: ssh exited with exit code 255", flush=True)
{last_word}
time.sleep(60)
"""
    start = time.monotonic()
    outcome = fake.run(launcher, settle_seconds=0.5)
    assert time.monotonic() - start < 20
    assert outcome.cause is not None and not outcome.ok
    assert (outcome.exit_code, outcome.cause.rank, outcome.cause.host) == (1, None, "node2")
    assert "connection to node2" in outcome.cause.reason
    assert fake.left() == []


def test_find_lost_host() -> None:
    assert find_lost_host(["pdsh@n1: 10.0.0.2: ssh exited with exit code 255"]) == "10.0.0.2"
    assert find_lost_host(["pdsh@n1: n2: ssh exited with exit code 247"]) is None
    assert find_lost_host(["n1: pdsh@n1: n2: ssh exited with exit code 255"]) is None


def test_ranks_left_behind_are_ended(fake: Fake) -> None:
    """SIGKILL of DeepSpeed's node launcher: its runner exits 0, and the ranks would train on."""
    launcher = """
code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(300)"
for rank in (0, 1):
    argv = [sys.executable, "-c", code, mark]
    say(rank, "running", pid=subprocess.Popen(argv, start_new_session=rank == 1).pid)
"""
    outcome = fake.run(launcher, settle_seconds=0.1)
    assert not outcome.ok
    assert outcome.cause is not None
    assert outcome.cause.reason == (
        "the launcher ended before its ranks (exit code 0, 2 processes left): a process that it started was"
        " probably killed"
    )


def test_an_error_of_the_display_ends_the_run(fake: Fake) -> None:
    def tick() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        supervise(
            fake.command("time.sleep(300)"),
            environment={},
            folder=fake.folder,
            control=ControlServer(1),
            world_size=1,
            on_tick=tick,
        )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_lets_ranks_end_well(fake: Fake, number: signal.Signals) -> None:
    rank = """
def save(*_): folder.rank_log(rank).write_text("saved"); sys.exit(0)
signal.signal(signal.SIGTERM, save); say(rank, "running"); time.sleep(300)
"""
    threading.Timer(1.5, os.kill, (os.getpid(), number)).start()
    before = signal.getsignal(number)
    outcome = fake.run(TWO_RANKS, rank, leave_seconds=0.2)
    assert signal.getsignal(number) == before
    assert outcome.cause is not None
    assert (outcome.exit_code, outcome.cause.reason) == (128 + number, f"stopped by {number.name}")
    assert [fake.folder.rank_log(r).read_text() for r in (0, 1)] == ["saved", "saved"]


STUBBORN = "signal.signal(signal.SIGTERM, signal.SIG_IGN); say(0, 'running'); time.sleep(300)"


def test_who_ignores_the_stop_is_killed(fake: Fake) -> None:
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    started = time.monotonic()
    assert fake.run(STUBBORN, world_size=1, leave_seconds=0.2, grace_seconds=1.0).exit_code == 143
    assert 1.9 < time.monotonic() - started < 8


def test_a_stop_lets_ranks_leave_in_order(fake: Fake) -> None:
    rank = """
say(rank, "running")
while not folder.stop_request.exists(): time.sleep(0.05)
folder.write_status(RankStatus(rank, socket.gethostname(), os.getpid(), "stopped", step=7))
"""
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGUSR1)).start()
    assert fake.run(TWO_RANKS, rank) == Outcome(False, RESUMABLE, None, stopped_after=7)
    assert not fake.folder.stop_request.exists()


def test_who_fails_while_it_leaves_is_not_to_start_again(fake: Fake) -> None:
    rank = """
say(rank, "running")
while not folder.stop_request.exists(): time.sleep(0.05)
say(rank, "failed", "OSError: no space left"); sys.exit(1)
"""
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    outcome = fake.run(TWO_RANKS, rank)
    assert outcome.by_user and outcome.cause is not None
    assert outcome.cause.reason == "OSError: no space left"


def test_a_second_stop_ends_at_once(fake: Fake) -> None:
    for seconds in (1.0, 1.5):
        threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT)).start()
    started = time.monotonic()
    assert fake.run(STUBBORN, world_size=1, grace_seconds=60.0).exit_code == 130
    assert time.monotonic() - started < 15


@pytest.mark.parametrize(
    ("first", "then"),
    [(signal.SIGINT, signal.SIGINT), (signal.SIGHUP, signal.SIGHUP), (signal.SIGTERM, signal.SIGHUP)],
    ids=["a wrapper passes it on", "the shell tells it too", "the terminal closes as well"],
)
def test_what_one_cause_sends_twice_is_no_second_stop(
    fake: Fake, first: signal.Signals, then: signal.Signals
) -> None:
    rank = """
say(rank, "running")
while not folder.stop_request.exists(): time.sleep(0.05)
time.sleep(1)
folder.write_status(RankStatus(rank, socket.gethostname(), os.getpid(), "stopped", step=7))
"""

    def send() -> None:
        os.kill(os.getpid(), first)
        time.sleep(0.02)
        os.kill(os.getpid(), then)

    threading.Timer(1.0, send).start()
    assert fake.run(TWO_RANKS, rank) == Outcome(False, RESUMABLE, None, stopped_after=7)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_what_the_caller_ignores_ends_nothing(fake: Fake, number: signal.Signals) -> None:
    """``nohup dstrain run``, or the background job of a script: the launcher and the ranks ignore it as well."""
    rank = f"""
say(rank, "running")
os.kill(os.getpid(), {int(number)})
time.sleep(1)
say(rank, "done")
"""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        threading.Timer(0.5, os.kill, (os.getpid(), number)).start()
        assert fake.run(TWO_RANKS, rank) == Outcome(True, 0, None)
    finally:
        signal.signal(number, before)


def test_nothing_outlives_a_killed_supervisor(fake: Fake) -> None:
    command = fake.command(TWO_RANKS, "say(rank, 'running'); time.sleep(300)")
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from dstrain.supervise.control_server import ControlServer
from dstrain.supervise.supervisor import supervise
from dstrain.runs.run_folder import RunFolder
supervise({command!r}, environment={{}}, folder=RunFolder(sys.argv[1]), control=ControlServer(2), world_size=2,
    on_tick=lambda: None)
"""
    supervisor = subprocess.Popen([sys.executable, "-c", code, str(fake.folder.path)])
    _wait(lambda: all(fake.folder.read_status(rank) for rank in (0, 1)))
    assert fake.left()
    supervisor.kill()
    supervisor.wait()
    _wait(lambda: not fake.left())


def _wait(until, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_find_killed_rank() -> None:
    error = "[2026-01-01] [ERROR] [launch.py:325:sigkill_handler] ['python'] exits with return code = "
    assert find_killed_rank([error + "1", "x"]) is None
    assert find_killed_rank([error + "-15", error + "-9"]) == KilledRank(None, 9)
    assert find_killed_rank(["n1: " + error + "1", "n2: " + error + "-11"]) == KilledRank("n2", 11)


@pytest.mark.parametrize(
    ("line", "killed"),
    [
        (
            "n2: E1121 api.py:1010] failed (exitcode: -9) local_rank: 1 (pid: 3) of binary: /x/python",
            ("n2", 9),
        ),
        ("mpirun noticed that process rank 3 with PID 7 on node n2 exited on signal 9 (Killed).", ("n2", 9)),
        ("srun: error: n2: task 3: Killed", ("n2", 9)),
        ("srun: error: n2: tasks 2-3: Segmentation fault (core dumped)", ("n2", 11)),
        ("srun: error: n2: task 3: Terminated", None),
        ("srun: error: n2: task 3: Exited with exit code 1", None),
    ],
)
def test_find_killed_rank_of_other_launchers(line: str, killed: tuple[str, int] | None) -> None:
    assert find_killed_rank(["earlier", line]) == (None if killed is None else KilledRank(*killed))
