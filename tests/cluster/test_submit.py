"""`dstrain submit` on a real Slurm: the job trains on its hosts, is told to go, goes on, and nothing is lost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dstrain.errors import RESUMABLE
from dstrain.runs.run_folder import RunFolder, read_metrics
from tests.support.cluster.commands import dstrain_argv
from tests.support.cluster.hosts import Cluster
from tests.support.cluster.needs import require_cluster
from tests.support.cluster.plain_path import plain_python
from tests.support.cluster.runs import lay_out, numbers
from tests.support.cluster.slurm import Slurm
from tests.support.cluster.waiting import wait_until

pytestmark = [pytest.mark.timeout(900), pytest.mark.heavy]

STEPS = 150
ARGUMENTS = [
    *("--model", "model", "--data", "text.jsonl", "--zero", "2", "--pipeline", "2", "--data-parallel", "2"),
    *("--seq-len", "32", "--global-batch", "8", "--micro-batch", "2", "--steps", str(STEPS)),
    *("--save-every", "1000", "--set", "eval_every=0", "--set", "sample_tokens=0", "--set", "check_every=0"),
]


class Jobs:
    """Slurm, and the folder on the shared disk where its jobs train."""

    def __init__(self, slurm: Slurm, environment: dict[str, str], place: Path) -> None:
        self.slurm, self.environment, self.place = slurm, slurm.environment(environment), place

    def folder(self, name: str) -> RunFolder:
        return RunFolder(self.place / "runs" / name)

    def submit(self, name: str, *arguments: str) -> str:
        """The number of the job."""
        argv = dstrain_argv("submit", *ARGUMENTS, "--nodes", "2", "--tasks-per-node", "2", "--name", name)
        said = self.slurm.cluster.run("n1", [*argv, *arguments], env=self.environment, cwd=self.place)
        assert said.code == 0, said
        first, *lines = said.out.splitlines()
        job = first.split()[1]
        assert first == f"job {job} submitted: nodes 2, ranks per node 2"
        assert [line.split()[0] for line in lines] == ["state", "follow", "stop", "script"]
        return job

    def when_it_trains(self, name: str, *, after: int = 0) -> int:
        """Wait until some more steps were trained; the number of the last."""
        wait_until(lambda: self.steps(name)[-1] > after + 3, 120, what=f"training\n{self.log(name)}")
        return self.steps(name)[-1]

    def steps(self, name: str) -> list[int]:
        return [0, *(record["step"] for record in read_metrics(self.folder(name).metrics))]

    def numbers(self, name: str) -> list[dict[str, Any]]:
        return numbers(self.folder(name))

    def command(self, *argv: str) -> None:
        said = self.slurm.run(argv)
        assert said.code == 0, said

    def log(self, name: str) -> str:
        logs = sorted(self.folder(name).path.glob("slurm-*.log"))
        return "\n".join(path.read_text(errors="replace") for path in logs)


@pytest.fixture(scope="module")
def jobs(
    environment: dict[str, str], materials: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Jobs]:
    require_cluster(slurm=True)
    place = tmp_path_factory.mktemp("jobs")
    lay_out(materials, place)
    with Cluster(tmp_path_factory.mktemp("slurm") / "cluster", 2) as cluster, Slurm(cluster) as slurm:
        yield Jobs(slurm, environment, place)


@pytest.fixture(scope="module")
def undisturbed(jobs: Jobs) -> list[dict[str, Any]]:
    """The numbers of the same run on one host, by itself."""
    argv = dstrain_argv("run", *ARGUMENTS, "--name", "undisturbed")
    said = jobs.slurm.cluster.run("n1", argv, env=jobs.environment, cwd=jobs.place, timeout=200)
    assert said.code == 0, said
    return jobs.numbers("undisturbed")


def test_a_job_whose_time_is_over_goes_on(jobs: Jobs, undisturbed: list[dict[str, Any]]) -> None:
    """Slurm's warning before the end of its time: the run saves, the job requeues itself and trains the rest."""
    job = jobs.submit("time")
    jobs.when_it_trains("time")
    jobs.command("scancel", "--batch", "--signal=USR1", job)  # what --signal=B:USR1@120 does
    jobs.slurm.wait_for(job, "COMPLETED", "FAILED", "CANCELLED", seconds=200)
    log = jobs.log("time")
    assert jobs.slurm.state(job) == "COMPLETED", log
    assert jobs.slurm.show(job)["Restarts"] == "1"
    assert "the run continues when job" in log and "continues from step-" in log
    assert jobs.numbers("time") == undisturbed


def test_a_preempted_job_goes_on(jobs: Jobs, undisturbed: list[dict[str, Any]]) -> None:
    """A job of higher priority takes its hosts: it saves before it goes, and comes back behind the other."""
    job = jobs.submit("preempted")
    jobs.when_it_trains("preempted")
    urgent = jobs.place / "urgent.sbatch"
    urgent.write_text(f"#!/bin/bash\ncp {jobs.folder('preempted').metrics} {jobs.place}/seen\n")
    jobs.command(
        "sbatch", "--partition=urgent", "--nodes=2", "--ntasks-per-node=2", "--output=/dev/null", str(urgent)
    )
    jobs.slurm.wait_for(job, "COMPLETED", "FAILED", "CANCELLED", seconds=200)
    assert jobs.slurm.state(job) == "COMPLETED", jobs.log("preempted")
    assert jobs.slurm.show(job)["Restarts"] == "1"
    seen = read_metrics(jobs.place / "seen")[-1]["step"]
    assert 0 < seen < STEPS
    assert f"continues from step-{seen:06d}" in jobs.log("preempted"), jobs.log("preempted")
    assert jobs.numbers("preempted") == undisturbed


def test_a_job_that_its_user_stops_saves_and_stays_away(
    jobs: Jobs, undisturbed: list[dict[str, Any]]
) -> None:
    """As `dstrain submit` says it; and its script goes on by hand."""
    job = jobs.submit("stopped")
    jobs.when_it_trains("stopped")
    jobs.command("scancel", "--batch", "--signal=TERM", job)
    assert jobs.slurm.wait_for(job, "COMPLETED", "FAILED", "PENDING", seconds=60) == "FAILED"
    assert jobs.slurm.show(job)["ExitCode"] == f"{RESUMABLE}:0", jobs.log("stopped")
    assert jobs.steps("stopped")[-1] < STEPS
    said = jobs.slurm.run(
        ["sbatch", "--parsable", jobs.folder("stopped").batch_script], env=jobs.environment, cwd=Path("/")
    )
    assert said.code == 0, said
    jobs.slurm.wait_for(said.out.strip(), "COMPLETED", "FAILED", seconds=200)
    assert jobs.numbers("stopped") == undisturbed, jobs.log("stopped")
    assert plain_python() in jobs.folder("stopped").batch_script.read_text()
