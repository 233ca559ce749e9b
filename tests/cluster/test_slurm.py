"""The Slurm of the tests: jobs run on the hosts with what Slurm sets, and a lost host is noticed."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from dstrain.launch.allocation import slurm_allocation
from dstrain.launch.launch_spec import LaunchSpec
from dstrain.launch.launchers.slurm import command as srun_command
from dstrain.launch.placement import _refuse_shared_gpus
from dstrain.planning.layout import Host
from dstrain.train.device import device_number
from dstrain.train.rank_environment import rank_variables
from tests.support.cluster.hosts import Cluster
from tests.support.cluster.needs import require_cluster
from tests.support.cluster.slurm import Slurm
from tests.support.cluster.waiting import wait_until

pytestmark = pytest.mark.timeout(200)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    require_cluster(slurm=True)
    with Cluster(tmp_path_factory.mktemp("slurm") / "cluster", 2) as cluster, Slurm(cluster) as slurm:
        yield slurm


def submit(slurm: Slurm, place: Path, text: str, *options: str) -> str:
    """The number of the job that the batch script ``text`` became."""
    script = place / "job.sbatch"
    script.write_text(f"#!/bin/bash\n{text}")
    said = slurm.run(["sbatch", "--parsable", *options, script], cwd=place)
    assert said.code == 0, said
    return said.out.strip()


def test_a_job_has_a_task_on_each_slot(slurm: Slurm, tmp_path: Path) -> None:
    told = "echo $(hostname) $SLURM_PROCID $SLURM_LOCALID $SLURM_NODEID $SLURM_NTASKS $CUDA_VISIBLE_DEVICES"
    text = f"srun bash -c '{told}' > tasks\nhostname > batch\n"
    job = submit(slurm, tmp_path, text, "--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2")
    slurm.wait_for(job, "COMPLETED")
    assert sorted((tmp_path / "tasks").read_text().splitlines()) == [
        "n1 0 0 0 4 0,1",
        "n1 1 1 0 4 0,1",
        "n2 2 0 1 4 0,1",
        "n2 3 1 1 4 0,1",
    ]
    assert (tmp_path / "batch").read_text() == "n1\n"


@pytest.mark.parametrize(
    "options", [("--gpus-per-task=1",), ("--gpus-per-node=2", "--gpu-bind=single:1")], ids=" ".join
)
def test_ranks_that_see_a_gpu_of_their_own(slurm: Slurm, tmp_path: Path, options: tuple[str, ...]) -> None:
    """What Slurm tells each of them is enough to know that the one GPU that it sees is its own."""
    worker = tmp_path / "worker"
    worker.write_text(f"#!/bin/bash\nenv -0 > {tmp_path}/rank-$SLURM_PROCID\n")
    worker.chmod(0o755)
    hosts = (Host("n1", 2), Host("n2", 2))
    spec = LaunchSpec(tmp_path, hosts, 2, "cuda", "n1", 29501, {}, launcher="slurm", python=str(worker))
    srun = shlex.join(srun_command(spec, {"SLURM_JOB_ID": "of the job"}))
    text = f"env -0 > batch\n{srun}\n"
    slurm.wait_for(submit(slurm, tmp_path, text, "--nodes=2", "--ntasks-per-node=2", *options), "COMPLETED")
    ranks = [variables(tmp_path / f"rank-{rank}") for rank in range(4)]
    seen = [rank["CUDA_VISIBLE_DEVICES"].split(",") for rank in ranks]
    assert [len(each) for each in seen] == [1, 1, 1, 1], seen
    for rank in ranks:
        assert device_number(rank | rank_variables(rank), visible=1) == 0
    batch = variables(tmp_path / "batch")
    found = slurm_allocation(batch, lambda _: ["n1", "n2"])
    assert found is not None and found.hosts == hosts
    _refuse_shared_gpus(found, batch)


def variables(file: Path) -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in file.read_text().split("\0") if pair)


def test_a_job_that_fails_is_told_apart(slurm: Slurm, tmp_path: Path) -> None:
    job = submit(slurm, tmp_path, "exit 3\n")
    assert slurm.wait_for(job, "COMPLETED", "FAILED") == "FAILED"
    assert slurm.show(job)["ExitCode"] == "3:0"


def test_a_requeued_job_is_warned_and_runs_again(slurm: Slurm, tmp_path: Path) -> None:
    text = """
trap 'echo warned >> word; exit 1' TERM
echo started $SLURM_RESTART_COUNT >> word
[ -z "$SLURM_RESTART_COUNT" ] || exit 0
while :; do sleep 0.1; done
"""
    job = submit(slurm, tmp_path, text, "--requeue")
    wait_until((tmp_path / "word").exists, what="the start of the job")
    assert slurm.run(["scontrol", "requeue", job]).code == 0
    slurm.wait_for(job, "COMPLETED")
    assert (tmp_path / "word").read_text() == "started\nwarned\nstarted 1\n"


@pytest.mark.heavy  # Slurm takes its time: half a minute
def test_a_lost_host_is_noticed_and_taken_back(slurm: Slurm, tmp_path: Path) -> None:
    job = submit(slurm, tmp_path, "sleep 1000\n", "--nodes=2", "--no-requeue")
    slurm.wait_for(job, "RUNNING")
    slurm.cluster.crash("n2")
    assert slurm.wait_for(job, "NODE_FAIL", "FAILED", "COMPLETED", seconds=90) == "NODE_FAIL"
    slurm.revive("n2")
    said = slurm.run(["srun", "--nodes=2", "--ntasks=2", "hostname"])
    assert sorted(said.out.split()) == ["n1", "n2"]


def test_its_daemons_are_not_counted_and_outlive_a_clean_up(slurm: Slurm) -> None:
    assert [slurm.cluster.processes(host) for host in slurm.cluster.names] == [[], []]
    slurm.cluster.stop_all()
    slurm.wait_for_hosts()
