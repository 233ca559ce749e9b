"""What other users of the machines see of a run, with each launcher: no key in command lines and files, few listeners.

A hook on each rank tells the key that it was started with, so that the test knows what to look for. So these processes
are started, and not forked.
"""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from dstrain.runs.run_folder import RunFolder
from tests.support.cluster.commands import TWO_STAGES, dstrain_argv
from tests.support.cluster.hosts import Cluster
from tests.support.cluster.needs import require_cluster
from tests.support.cluster.runs import OWN_CODE
from tests.support.cluster.slurm import Slurm
from tests.support.cluster.waiting import wait_until
from tests.support.cluster.watching import Listener, Watch, readable_with

pytestmark = pytest.mark.timeout(400)

ARGUMENTS = [
    *TWO_STAGES,
    *("--steps", "6", "--save-every", "2", "--set", "sample_tokens=4"),
    *("--set", "hooks=[watching_hosts:KeyBackwards]"),
    *("--set", f"code_dirs={json.dumps([str(OWN_CODE)])}"),
]
OTHERS_SECRETS = {
    "HF_TOKEN": "hf_5ecret",
    "WANDB_API_KEY": "wandb_5ecret",
    "MLFLOW_TRACKING_TOKEN": "ml_5ecret",
}
LOOPBACK, CARD, ALL = "loopback", "the card between the hosts", "all addresses"
SUPERVISOR, RANK, AGENT = "dstrain run", "a rank", "torchrun's agent"
CHECK = "the check of the hosts before the run"
# By the name of the launch: its arguments, and what listens where.
ONE_HOST: dict[str, list[str]] = {
    "local": [],
    "torchrun here": ["--launcher", "torchrun"],
    "none here": ["--launcher", "none", "--processes", "2", "--node-rank", "0"],
}
TWO_HOSTS: dict[str, set[tuple[str, str]]] = {
    "pdsh": {(CHECK, ALL), (SUPERVISOR, ALL), (RANK, ALL), (RANK, CARD)},
    "torchrun": {(CHECK, ALL), (SUPERVISOR, ALL), (AGENT, ALL), (RANK, CARD)},
    "openmpi": {
        (CHECK, ALL),
        (SUPERVISOR, ALL),
        (RANK, ALL),
        (RANK, CARD),
        ("mpirun", ALL),
        ("mpirun", LOOPBACK),
    },
    "slurm": {(SUPERVISOR, ALL), (RANK, ALL), (RANK, CARD), ("srun", ALL)},
    "none": {(SUPERVISOR, LOOPBACK), (AGENT, ALL), (RANK, CARD)},
}
# A hostfile of one host that is not this one, and a job of one node.
ONE_OTHER_HOST: dict[str, set[tuple[str, str]]] = {
    "pdsh": {(CHECK, ALL), (SUPERVISOR, ALL), (RANK, LOOPBACK)},
    "openmpi": {(CHECK, ALL), (SUPERVISOR, ALL), (RANK, LOOPBACK), ("mpirun", ALL), ("mpirun", LOOPBACK)},
}
ONE_NODE = {(SUPERVISOR, LOOPBACK), (RANK, LOOPBACK)}


class Run:
    """One run of the training, looked at from outside.

    Attributes:
        watch: what was seen while it went on.
        keys: of the control connection, as each rank had it.
        readable: the files with a key in them that others could read while it went on or after it.
    """

    def __init__(self, cluster: Cluster, environment: Mapping[str, str], place: Path) -> None:
        self._cluster, self._place = cluster, place
        self._environment = {**environment, **OTHERS_SECRETS}
        self.keys: list[str] = []
        self.readable: list[Path] = []

    def train(self, name: str, arguments: Mapping[str, list[str]]) -> None:
        """``arguments``: of the command on each host that is typed on."""
        folder = RunFolder(self._place / "runs" / name)
        since = time.time() - 1
        with Watch(self._cluster) as self.watch:
            commands = [
                self._cluster.start(host, argv, env=self._environment, cwd=self._place)
                for host, argv in arguments.items()
            ]
            files = [folder.path / f"key-backwards-{rank}" for rank in (0, 1)]
            wait_until(
                lambda: all(file.exists() for file in files) or not all(one.running() for one in commands),
                300,
                what="the first step",
            )
            self.keys = [file.read_text()[::-1] for file in files if file.exists()]
            self.readable += self._readable(since)
            for command in commands:
                said = command.wait(300)
                logs = "".join(path.read_text(errors="replace") for path in folder.logs.glob("*.log"))
                assert said.code == 0, f"{said}\n{logs}"
        self.readable += self._readable(since)

    def _readable(self, since: float) -> list[Path]:
        # The disk is shared but for these.
        own = ("dev/shm", "run")
        roots = [Path(f"/proc/{self._cluster.first_process(host)}/root") for host in self._cluster.names]
        places = [self._place, self._cluster.folder, *(root / name for root in roots for name in own)]
        places += [Path("/tmp"), Path("/var/tmp"), Path("/var/spool")]
        return readable_with([*self.keys, *OTHERS_SECRETS.values()], places, since=since)


def check_secrets(run: Run) -> None:
    assert len(run.keys) == 2 and all(len(key) == 64 for key in run.keys)
    worker = [line for line in run.watch.command_lines if b"dstrain.train.worker" in line]
    assert worker, "the ranks were not seen"
    for secret in (*run.keys, *OTHERS_SECRETS.values()):
        assert run.watch.seen(secret) == []
    assert run.readable == []


def who_listens_where(run: Run) -> set[tuple[str, str]]:
    return {(_who(listener), _where(listener)) for listener in run.watch.listeners.values()}


def _who(listener: Listener) -> str:
    """What starts a rank has the rank's words among its own."""
    program = os.path.basename(listener.program.partition(" ")[0])
    if program in ("mpirun", "orted", "srun"):
        return {"orted": "mpirun"}.get(program, program)
    modules = {
        "torch.distributed.run": AGENT,
        "dstrain.train.worker": RANK,
        "dstrain.diagnostics.host": CHECK,
        "dstrain.cli.main": SUPERVISOR,
    }
    return next((name for module, name in modules.items() if module in listener.program), listener.program)


def _where(listener: Listener) -> str:
    if not listener.off_loopback:
        return LOOPBACK
    return ALL if listener.address in ("0.0.0.0", "::") else CARD


@pytest.fixture(scope="module")
def place(shared_place: Path) -> Path:
    (shared_place / "hosts").write_text("n1 slots=1\nn2 slots=1\n")
    return shared_place


def check_listeners(run: Run, table: set[tuple[str, str]]) -> None:
    """Nobody listens who is not in the table. What listens for a moment only may not have been seen."""
    seen = who_listens_where(run)
    assert seen <= table
    assert {each for each in table if each[0] in (SUPERVISOR, RANK, AGENT)} <= seen


@pytest.fixture
def run(cluster: Cluster, real_environment: dict[str, str], place: Path) -> Run:
    return Run(cluster, real_environment, place)


@pytest.mark.heavy
@pytest.mark.parametrize("launch", ONE_HOST)
def test_a_run_of_one_host(run: Run, launch: str) -> None:
    name = launch.replace(" ", "-")
    run.train(name, {"n1": dstrain_argv(*ARGUMENTS, "--name", name, *ONE_HOST[launch])})
    check_secrets(run)
    assert len(set(run.keys)) == 1
    assert run.watch.off_loopback() == []
    assert who_listens_where(run) == {(SUPERVISOR, LOOPBACK), (RANK, LOOPBACK)}


@pytest.mark.heavy
@pytest.mark.parametrize("launcher", ["pdsh", "torchrun", "openmpi"])
def test_a_run_over_ssh(run: Run, launcher: str) -> None:
    if launcher == "openmpi":
        require_cluster(openmpi=True)
    given = ["--name", launcher, "--hostfile", "hosts", "--launcher", launcher]
    run.train(launcher, {"n1": dstrain_argv(*ARGUMENTS, *given)})
    check_secrets(run)
    assert len(set(run.keys)) == 1
    check_listeners(run, TWO_HOSTS[launcher])


@pytest.mark.heavy
@pytest.mark.parametrize("launcher", ["pdsh", "openmpi"])
def test_a_hostfile_of_one_other_host(run: Run, place: Path, launcher: str) -> None:
    if launcher == "openmpi":
        require_cluster(openmpi=True)
    (place / "other_host").write_text("n2 slots=2\n")
    name = f"{launcher}-other"
    given = ["--name", name, "--hostfile", "other_host", "--launcher", launcher]
    run.train(name, {"n1": dstrain_argv(*ARGUMENTS, *given)})
    check_secrets(run)
    check_listeners(run, ONE_OTHER_HOST[launcher])


@pytest.mark.heavy
def test_a_run_typed_on_every_node(run: Run) -> None:
    """Each node has a supervisor of its own for its own ranks, and so a key of its own."""
    given = [
        "--name",
        "none",
        "--launcher",
        "none",
        "--nodes",
        "2",
        "--processes",
        "1",
        "--master-addr",
        "n1",
    ]
    run.train(
        "none",
        {
            host: dstrain_argv(*ARGUMENTS, *given, "--node-rank", str(node))
            for node, host in enumerate(("n1", "n2"))
        },
    )
    check_secrets(run)
    assert len(set(run.keys)) == 2
    check_listeners(run, TWO_HOSTS["none"])


@pytest.fixture
def slurm_run(real_environment: dict[str, str], place: Path, tmp_path: Path) -> Iterator[tuple[Run, Slurm]]:
    require_cluster(slurm=True)
    with Cluster(tmp_path / "cluster", 2) as cluster, Slurm(cluster) as slurm:
        yield Run(cluster, slurm.environment(real_environment), place), slurm


@pytest.mark.heavy
@pytest.mark.parametrize("nodes", [1, 2])
def test_a_run_of_slurm(slurm_run: tuple[Run, Slurm], place: Path, nodes: int) -> None:
    run, _ = slurm_run
    name = f"slurm-{nodes}"
    command = shlex.join(dstrain_argv(*ARGUMENTS, "--name", name))
    script = place / "job.sbatch"
    script.write_text(f"#!/bin/bash\nexec {command}\n")
    wanted = [f"--nodes={nodes}", f"--ntasks-per-node={2 // nodes}", f"--output={place}/job.log"]
    run.train(name, {"n1": ["sbatch", "--wait", *wanted, os.fspath(script)]})
    check_secrets(run)
    assert len(set(run.keys)) == 1
    check_listeners(run, TWO_HOSTS["slurm"] if nodes == 2 else ONE_NODE)
