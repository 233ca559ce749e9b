"""`dstrain run --hostfile` on two hosts with two ranks each, through DeepSpeed's launcher and pdsh.

A launch costs many seconds, so five serve all tests: one with a hostfile, one on a single host to compare with, one
that loses a rank, its launch.sh typed by hand, and `deepspeed --hostfile` typed by hand.
"""

from __future__ import annotations

import json
import os
import shlex
import time
from pathlib import Path
from typing import Any

import pytest

from dstrain.runs.checkpoint.manifest import complete_checkpoints
from dstrain.runs.run_folder import RunFolder
from tests.support.cluster.commands import Command, Result, dstrain_argv
from tests.support.cluster.hosts import Cluster
from tests.support.cluster.plain_path import plain_script
from tests.support.cluster.processes import Process
from tests.support.cluster.runs import END_SECONDS, HOOKS, check_hooks, numbers
from tests.support.cluster.waiting import wait_until

# `cluster`: nothing runs on the hosts after a test, whatever came of it.
pytestmark = [pytest.mark.timeout(400), pytest.mark.usefixtures("cluster")]

STEPS, SAVE_EVERY = 12, 2
ARGUMENTS = [
    *("--model", "model", "--data", "text.jsonl", "--zero", "2", "--pipeline", "2", "--data-parallel", "2"),
    *("--seq-len", "32", "--global-batch", "8", "--micro-batch", "2", "--steps", str(STEPS)),
    *("--save-every", str(SAVE_EVERY), "--set", "validation=0.2", "--set", "sample_tokens=4"),
]


class Placement:
    """The folder on the shared disk where this file's runs lie, and the hosts that they run on."""

    def __init__(self, cluster: Cluster, environment: dict[str, str], place: Path) -> None:
        self.cluster, self._environment, self.place = cluster, environment, place
        (place / "hosts").write_text("n1 slots=2\nn2 slots=2\n")

    def folder(self, name: str) -> RunFolder:
        return RunFolder(self.place / "runs" / name)

    def start(self, name: str, *arguments: str) -> Command:
        argv = dstrain_argv("run", *ARGUMENTS, "--name", name, *arguments)
        return self.cluster.start("n1", argv, env=self._environment, cwd=self.place)

    def left(self) -> list[Process]:
        return [process for host in self.cluster.names for process in self.cluster.processes(host)]

    def numbers(self, name: str) -> list[dict[str, Any]]:
        return numbers(self.folder(name))


@pytest.fixture(scope="module")
def site(session_cluster: Cluster, environment: dict[str, str], shared_place: Path) -> Placement:
    return Placement(session_cluster, environment, shared_place)


@pytest.fixture(scope="module")
def near(site: Placement) -> Result:
    """The same layout on one host."""
    said = site.start("near").wait(200)
    assert said.code == 0, said
    return said


@pytest.fixture(scope="module")
def far(site: Placement) -> Result:
    said = site.start("far", "--hostfile", "hosts", *HOOKS).wait(200)
    assert said.code == 0, f"{said}\n{site.folder('far').launcher_log.read_text()}"
    wait_until(lambda: not site.left(), 5, what="the end of all processes")
    return said


def test_the_ranks_are_on_the_hosts_of_the_plan(site: Placement, far: Result) -> None:
    hosts = []
    for rank in range(4):
        status = site.folder("far").read_status(rank)
        assert status is not None and (status.state, status.step) == ("done", STEPS)
        hosts.append(status.host)
    assert hosts == ["n1", "n1", "n2", "n2"]


def test_losses_and_norms_are_those_of_one_host(site: Placement, far: Result, near: Result) -> None:
    assert len(site.numbers("near")) == STEPS + 1
    assert site.numbers("far") == site.numbers("near")
    results = [json.loads(site.folder(name).result.read_text()) for name in ("far", "near")]
    assert results[0] == results[1]


def test_hooks_are_called_where_the_ranks_are(site: Placement, far: Result) -> None:
    check_hooks(site.folder("far"), ["n1", "n1", "n2", "n2"], STEPS)


def test_launch_sh_is_the_command_that_was_shown(site: Placement, far: Result) -> None:
    shown = next(line for line in far.out.splitlines() if line.startswith("command"))
    script = site.folder("far").launch_script.read_text().splitlines()
    assert shlex.split(script[-1])[1:] == shlex.split(shown)[1:]
    assert "deepspeed.launcher.runner" in script[-1] and "--hostfile" in script[-1]


def test_a_killed_rank_of_another_host_ends_the_run_and_is_named(site: Placement, near: Result) -> None:
    cluster, folder = site.cluster, site.folder("killed")
    command = site.start("killed", "--hostfile", "hosts")
    wait_until(
        lambda: complete_checkpoints(folder.checkpoints) or not command.running(), 200, what="a checkpoint"
    )
    status = folder.read_status(3)
    assert status is not None and status.host == "n2" and status.state == "running", command.err
    [victim] = [process for process in cluster.processes("n2") if process.pid == status.pid]
    assert cluster.kill("n2", victim)
    killed = time.monotonic()
    said = command.wait(120)
    seconds = time.monotonic() - killed
    left = site.left()
    assert said.code not in (0, None)
    cause, hint = said.err.strip().splitlines()[-2:]
    assert cause.startswith("rank 3 on n2: ") and "SIGKILL" in cause, said
    assert hint.strip().startswith("hint: `dstrain resume ")
    assert seconds < END_SECONDS
    assert not left, "a run that has ended leaves nothing behind"
    assert len(site.numbers("killed")) < STEPS + 1, "the kill came too late to test anything"

    # As typed by hand: from another folder, with nothing but what a login gives. It goes on where the run was saved.
    by_hand = cluster.run("n1", ["bash", folder.launch_script], cwd=Path("/"), timeout=200)
    assert by_hand.code == 0, by_hand
    assert site.numbers("killed") == site.numbers("near")
    wait_until(lambda: not site.left(), 5, what="the end of all processes")


@pytest.mark.heavy
def test_deepspeed_typed_by_hand(
    site: Placement, near: Result, real_environment: dict[str, str], tmp_path: Path
) -> None:
    """The README's second way to train: the folder is filled, and `deepspeed` itself starts the ranks."""
    prepared = site.start("typed", "--hostfile", "hosts", "--prepare").wait(100)
    assert prepared.code == 0, prepared
    folder = site.folder("typed")
    assert (
        f"deepspeed --hostfile {folder.hostfile} --module dstrain.train.worker {folder.path}" in prepared.out
    )
    assert not folder.metrics.exists(), "nothing was started"

    # A shell in which the virtual environment is active; the other variables come with the folder.
    of_the_run = ("DSTRAIN_CACHE", "DS_ACCELERATOR", "OMP_NUM_THREADS")
    active = {name: value for name, value in real_environment.items() if name not in of_the_run}
    active["PATH"] = f"{plain_script('deepspeed', tmp_path).parent}{os.pathsep}{active['PATH']}"
    words = shlex.split("deepspeed --hostfile hosts --module dstrain.train.worker runs/typed")
    said = site.cluster.run("n1", words, env=active, cwd=site.place, timeout=200)
    assert said.code == 0, said
    assert f"step {STEPS}/{STEPS}" in said.out, "rank 0 says how it goes"
    assert site.numbers("typed") == site.numbers("near")
    wait_until(lambda: not site.left(), 5, what="the end of all processes")
