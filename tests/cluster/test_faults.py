"""What goes wrong while a run goes on on two hosts: it ends on every host within 30 s, and the cause is named.

A launch with torch costs many seconds, and failures need none of it: most tests take `small_run` in its place. The
heavy ones let a real run suffer one fault after the other, and with `--restarts` it ends as if nothing had been.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dstrain.runs.run_folder import RunFolder
from tests.support.cluster.commands import Command, Result, dstrain_argv
from tests.support.cluster.hosts import Cluster
from tests.support.cluster.plain_path import plain_python
from tests.support.cluster.runs import END_SECONDS, numbers
from tests.support.cluster.small_run import argv as small_argv
from tests.support.cluster.waiting import wait_until

# `cluster`: nothing runs on the hosts after a test, whatever came of it.
pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("cluster")]

LONG, SHORT = 6000, 60  # steps of a small run, 0.1 s each
HANG_SECONDS = 12  # where a test waits for a hang: less than a cut line takes

STEPS, SAVE_EVERY = 400, 10
ARGUMENTS = [
    *("--model", "model", "--data", "text.jsonl", "--zero", "2", "--pipeline", "2", "--data-parallel", "2"),
    *("--seq-len", "16", "--global-batch", "4", "--micro-batch", "2", "--steps", str(STEPS)),
    *("--save-every", str(SAVE_EVERY), "--set", "validation=0", "--set", "sample_tokens=0"),
]


class Run:
    """A run of two ranks on n1 and two on n2, which was started on n1."""

    def __init__(self, cluster: Cluster, command: Command, folder: RunFolder) -> None:
        self.cluster, self.command, self.folder = cluster, command, folder

    def pids(self) -> list[int]:
        """Of the ranks that have spoken, by their numbers on their hosts."""
        statuses = [self.folder.read_status(rank) for rank in range(4)]
        return [status.pid for status in statuses if status is not None]

    def strike(self, host: str, *words: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Signal the one process that has all of these words among its arguments, but for the guard, which repeats
        its child's. (A shell's script is one word.)"""
        there = [process for process in self.cluster.processes(host) if "-I" not in process.arguments]
        [victim] = [process for process in there if set(words) <= {process.arguments[0], *process.arguments}]
        assert self.cluster.kill(host, victim, number)

    def strike_rank(self, rank: int, number: signal.Signals = signal.SIGKILL) -> None:
        status = self.folder.read_status(rank)
        assert status is not None and status.state == "running"
        [victim] = [process for process in self.cluster.processes(status.host) if process.pid == status.pid]
        assert self.cluster.kill(status.host, victim, number)

    def left(self) -> list[str]:
        """What runs of it, but for the command itself. sshd's own process of a connection that was cut is not the
        run's: it waits for the cable."""
        own = ("dstrain.cli.main", "command")
        return [
            f"{host}: {process}"
            for host in self.cluster.names
            for process in self.cluster.processes(host)
            if not process.arguments[0].startswith("sshd")
            and ("-I" in process.arguments or not set(own) & set(process.arguments))
        ]

    def wait_for_the_end_of_all(self, begun: float) -> float:
        """How many seconds after ``begun`` nothing of it was left on any host."""
        while left := self.left():
            assert time.monotonic() - begun < END_SECONDS, left
            time.sleep(0.02)
        return time.monotonic() - begun


@dataclass(frozen=True)
class Fault:
    """What happens, what the run says of it, and what is done before it can go on.

    Attributes:
        words: of the reason.
        rank: that is at fault; None where it is no single one.
        host: that is at fault; None where it is none.
        hang_after: seconds without a step that a small run takes for a hang.
    """

    strike: Callable[[Run], object]
    words: str
    rank: int | None = None
    host: str | None = None
    mend: Callable[[Run], object] = lambda run: None
    hang_after: int = 60


LAUNCHER, RUNNER = "deepspeed.launcher.launch", "deepspeed.launcher.runner"
KILLED = "killed by SIGKILL (probably out of memory)"
LOST = "no contact with n2 any more: it lost power or network"
LEFT = "the launcher ended before its ranks "

RANK_HERE = Fault(lambda run: run.strike_rank(1), KILLED, 1, "n1")
RANK_THERE = Fault(lambda run: run.strike_rank(3), KILLED, 3, "n2")
STOPPED = Fault(
    lambda run: run.strike_rank(3, signal.SIGSTOP), "rank 3 on n2 does not answer: stopped (SIGSTOP)", 3, "n2"
)
# Nobody is left on n2 who could say that a neighbour is stopped, or end it.
ALL_STOPPED = Fault(
    lambda run: [run.strike_rank(rank, signal.SIGSTOP) for rank in (2, 3)],
    f"(hang_after: {HANG_SECONDS} s); rank 2 on n2, rank 3 on n2 do not answer: stopped (SIGSTOP)",
    2,
    "n2",
    hang_after=HANG_SECONDS,
)
PDSH = Fault(lambda run: run.strike("n1", "pdsh", "-S"), f"{LEFT}(exit code 0")
CRASH = Fault(lambda run: run.cluster.crash("n2"), LOST, None, "n2", lambda run: run.cluster.revive("n2"))
CABLE = Fault(lambda run: run.cluster.cut("n2"), LOST, None, "n2", lambda run: run.cluster.heal("n2"))


def launcher_of(host: str, word: str) -> Fault:
    """SIGKILL of the launcher of one host's ranks. ``word`` is among its arguments."""
    return Fault(
        lambda run: run.strike(host, plain_python(), word),
        f"the launcher on {host} ended before its ranks (killed?)",
        None,
        host,
    )


def child(word: str) -> Fault:
    """SIGKILL of the supervisor's child."""
    return Fault(lambda run: run.strike("n1", word), f"{LEFT}(killed by SIGKILL, ")


SMALL = {
    "rank-here": RANK_HERE,
    "rank-there": RANK_THERE,
    "launcher-here": launcher_of("n1", "node"),
    "launcher-there": launcher_of("n2", "node"),
    "child": child("runner"),
    "pdsh": PDSH,
    "stop": STOPPED,
    "stop-all": ALL_STOPPED,
    "power": CRASH,
    "cable": CABLE,
}
HEAVY = ("stop", "stop-all", "cable")
REAL = {
    "processes": [RANK_HERE, launcher_of("n2", LAUNCHER), child(RUNNER), PDSH, STOPPED],
    "hosts": [CRASH, CABLE],
}


@pytest.fixture
def small(
    cluster: Cluster, environment: dict[str, str], repository: Path, tmp_path: Path
) -> Callable[..., Run]:
    """Start a small run of so many steps, and wait until its ranks are at work."""

    def start(steps: int, hang_after: int = 60) -> Run:
        argv = small_argv("command", str(tmp_path / "run"), str(steps), str(hang_after))
        run = Run(
            cluster,
            cluster.start("n1", argv, env=environment, cwd=repository),
            RunFolder(tmp_path / "run"),
        )
        wait_until(lambda: len(run.pids()) == 4 or not run.command.running(), 60, what="the start")
        time.sleep(1)  # all have their connections
        return run

    return start


def cause_of(said: Result) -> dict[str, Any]:
    return dict(json.loads(said.out)["cause"])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.heavy] if name in HEAVY else []) for name in SMALL]
)
def test_a_fault_ends_the_run_on_every_host_and_is_named(small: Callable[..., Run], name: str) -> None:
    fault = SMALL[name]
    run = small(LONG, fault.hang_after)
    begun = time.monotonic()
    fault.strike(run)
    said = run.command.wait(60)
    seconds = time.monotonic() - begun
    gone = run.wait_for_the_end_of_all(begun)
    print(f"{seconds:.1f} s, all gone after {gone:.1f} s")
    assert said.code not in (0, None), said
    cause = cause_of(said)
    assert fault.words in cause["reason"], said
    assert (cause["rank"], cause["host"]) == (fault.rank, fault.host)
    assert seconds < END_SECONDS


def test_nothing_outlives_a_killed_command(small: Callable[..., Run]) -> None:
    run = small(LONG)
    begun = time.monotonic()
    run.command.kill()
    run.wait_for_the_end_of_all(begun)


def test_connected_ranks_need_no_ssh(small: Callable[..., Run]) -> None:
    """SIGKILL of the ssh that started them: the run goes on, and every rank reports its end."""
    run = small(SHORT)
    [ssh] = [p for p in run.cluster.processes("n1") if p.arguments[0] == "ssh" and "n2" in p.arguments]
    assert run.cluster.kill("n1", ssh)
    said = run.command.wait(60)
    assert said.code == 0, said
    assert "n2: ssh killed by signal 9" in run.folder.launcher_log.read_text()
    run.wait_for_the_end_of_all(time.monotonic())


@pytest.mark.heavy  # 15 s of waiting
def test_a_cable_that_comes_back_in_time_ends_nothing(small: Callable[..., Run]) -> None:
    run = small(SHORT)
    run.cluster.cut("n2")
    time.sleep(10)
    run.cluster.heal("n2")
    said = run.command.wait(60)
    assert said.code == 0, said


class Placement:
    """The folder on the shared disk where the real runs lie."""

    def __init__(self, cluster: Cluster, environment: dict[str, str], place: Path) -> None:
        self._cluster, self._environment, self._place = cluster, environment, place
        (place / "hosts").write_text("n1 slots=2\nn2 slots=2\n")

    def start(self, name: str, *arguments: str) -> Run:
        argv = dstrain_argv("run", *ARGUMENTS, "--name", name, *arguments)
        command = self._cluster.start("n1", argv, env=self._environment, cwd=self._place)
        return Run(self._cluster, command, RunFolder(self._place / "runs" / name))


@pytest.fixture(scope="module")
def site(session_cluster: Cluster, environment: dict[str, str], shared_place: Path) -> Placement:
    return Placement(session_cluster, environment, shared_place)


@pytest.fixture(scope="module")
def unbroken(site: Placement) -> list[dict[str, Any]]:
    """The numbers of the run that nothing happened to, on one host."""
    run = site.start("unbroken")
    said = run.command.wait(300)
    assert said.code == 0, said
    return numbers(run.folder)


def newest(run: Run) -> int:
    return max((int(path.name[len("step-") :]) for path in run.folder.checkpoints.glob("step-*")), default=0)


def train(run: Run, *, saved: int = 0, pids: list[int] | None = None) -> None:
    """Until a launch with other ranks than ``pids`` trains, and has made a newer checkpoint than ``saved``."""
    wait_until(
        lambda: not run.command.running() or (newest(run) > saved and run.pids() != pids),
        300,
        what="a new checkpoint",
    )
    assert run.command.running(), run.command.err
    assert newest(run) < STEPS - 2 * SAVE_EVERY, "the fault comes too late to test anything"


@pytest.mark.heavy
@pytest.mark.timeout(400)
def test_nothing_of_a_real_run_outlives_its_killed_command(site: Placement) -> None:
    run = site.start("killed", "--hostfile", "hosts")
    train(run)
    begun = time.monotonic()
    run.command.kill()
    gone = run.wait_for_the_end_of_all(begun)
    print(f"all gone after {gone:.1f} s")


@pytest.mark.heavy
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("name", REAL)
def test_a_run_that_is_started_again_ends_as_the_unbroken_one(
    site: Placement, name: str, unbroken: list[dict[str, Any]]
) -> None:
    run = site.start(f"again-{name}", "--hostfile", "hosts", "--restarts", "1")
    pids: list[int] = []
    for number, fault in enumerate(REAL[name], start=1):
        train(run, saved=newest(run), pids=pids)
        pids = run.pids()
        told = len(run.command.out)
        begun = time.monotonic()
        fault.strike(run)
        wait_until(
            lambda number=number: not run.command.running() or run.command.out.count("\nrestart ") == number,
            60,
            what="the end of the launch",
        )
        seconds = time.monotonic() - begun
        said = run.command.out[told:]
        assert run.command.running(), run.command.err
        gone = run.wait_for_the_end_of_all(begun)
        print(f"{said}\n{seconds:.1f} s, all gone after {gone:.1f} s", flush=True)
        who = "" if fault.rank is None else f"rank {fault.rank} on {fault.host}: "
        assert any(line.startswith(who) and fault.words in line for line in said.splitlines()), said
        assert seconds < END_SECONDS
        fault.mend(run)
    ended = run.command.wait(400)
    assert ended.code == 0, ended
    assert numbers(run.folder) == unbroken
