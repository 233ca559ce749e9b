"""Each way to start the ranks, on several hosts: the same plan gives the same numbers.

One run on a single host is what all are compared with. `test_hostfile` has pdsh, and its launch.sh typed by hand.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dstrain.errors import RESUMABLE
from dstrain.runs.checkpoint.manifest import complete_checkpoints
from dstrain.runs.run_folder import RunFolder
from tests.support.cluster.commands import Command, Result, dstrain_argv
from tests.support.cluster.hosts import Cluster
from tests.support.cluster.needs import require_cluster
from tests.support.cluster.runs import END_SECONDS, HOOKS, check_hooks, lay_out, numbers
from tests.support.cluster.slurm import Slurm
from tests.support.cluster.waiting import wait_until

pytestmark = pytest.mark.timeout(400)

STEPS = 8
ARGUMENTS = [
    *("--model", "model", "--data", "text.jsonl", "--zero", "2", "--pipeline", "2", "--data-parallel", "2"),
    *("--seq-len", "32", "--global-batch", "8", "--micro-batch", "2", "--steps", str(STEPS)),
    *("--save-every", "2", "--set", "validation=0.2", "--set", "sample_tokens=0"),
]


class Placement:
    """The folder on the shared disk where the runs lie, and the hosts that they run on."""

    def __init__(
        self, cluster: Cluster, slurm: Slurm | None, environment: dict[str, str], place: Path
    ) -> None:
        self.cluster, self.slurm, self.environment, self.place = cluster, slurm, environment, place

    def folder(self, name: str) -> RunFolder:
        return RunFolder(self.place / "runs" / name)

    def start(self, *arguments: str, host: str = "n1") -> Command:
        return self.cluster.start(host, dstrain_argv(*arguments), env=self.environment, cwd=self.place)

    def run(self, name: str, *arguments: str) -> Result:
        """`dstrain run` on n1, to its good end."""
        said = self.start("run", *ARGUMENTS, "--name", name, *arguments).wait(200)
        assert said.code == 0, f"{said}\n{self.log(name)}"
        return said

    def batch(self, text: str, *options: str) -> str:
        """The number of the job that the batch script became. Its steps stand in the folder of the runs."""
        assert self.slurm is not None
        script = self.place / "job.sbatch"
        script.write_text(f"#!/bin/bash\n{text}\n")
        argv = [
            "sbatch",
            "--parsable",
            "--open-mode=append",
            f"--output={self.place}/job-%j.log",
            *options,
            script,
        ]
        said = self.slurm.run(argv, env=self.environment, cwd=self.place)
        assert said.code == 0, said
        return said.out.strip()

    def log(self, name: str) -> str:
        logs = sorted(self.folder(name).logs.glob("*.log")) + sorted(self.place.glob("job-*.log"))
        return "\n".join(f"== {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in logs)

    def numbers(self, name: str) -> list[dict[str, Any]]:
        return numbers(self.folder(name))

    def hosts_of_ranks(self, name: str) -> list[str]:
        ranks = len(list(self.folder(name).logs.glob("rank-*.status.json")))
        statuses = [self.folder(name).read_status(rank) for rank in range(ranks)]
        assert all(status is not None and status.state == "done" for status in statuses), statuses
        return [status.host for status in statuses if status is not None]

    def nothing_is_left(self) -> None:
        wait_until(
            lambda: not any(self.cluster.processes(host) for host in self.cluster.names),
            10,
            what="the end of all processes",
        )


@pytest.fixture(scope="module")
def place(materials: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    lay_out(materials, folder)
    (folder / "hosts").write_text("n1 slots=2\nn2 slots=2\n")
    return folder


@pytest.fixture(scope="module")
def site(session_cluster: Cluster, environment: dict[str, str], place: Path) -> Placement:
    return Placement(session_cluster, None, environment, place)


@pytest.fixture(scope="module")
def local(site: Placement) -> list[dict[str, Any]]:
    """The numbers of the same run on one host."""
    site.run("local")
    numbers = site.numbers("local")
    assert len(numbers) == STEPS + 1
    return numbers


@pytest.fixture(scope="module")
def slurm_site(
    environment: dict[str, str], place: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Placement]:
    """Slurm's daemons stay on their hosts: these are others than the rest of the tests has."""
    require_cluster(slurm=True)
    with Cluster(tmp_path_factory.mktemp("slurm") / "cluster", 2) as cluster, Slurm(cluster) as slurm:
        yield Placement(cluster, slurm, slurm.environment(environment), place)


@pytest.mark.usefixtures("cluster")
def test_typed_on_every_node(site: Placement, local: list[dict[str, Any]]) -> None:
    """As in Kubernetes: nobody planned before, and the second node comes first."""
    typed = ["run", *ARGUMENTS, "--name", "none", "--launcher", "none", "--nodes", "2", "--processes", "2"]
    typed += ["--master-addr", "n1"]
    nodes = [site.start(*typed, "--node-rank", str(node), host=host) for node, host in ((1, "n2"), (0, "n1"))]
    for command in nodes:
        said = command.wait(200)
        assert said.code == 0, f"{said}\n{site.log('none')}"
    assert site.hosts_of_ranks("none") == ["n1", "n1", "n2", "n2"]
    assert site.numbers("none") == local
    site.nothing_is_left()


@pytest.mark.heavy
@pytest.mark.usefixtures("cluster")
def test_what_is_said_to_be_typed_is_typed(site: Placement, local: list[dict[str, Any]]) -> None:
    """Word for word on each node; and where one adds a word, none of them trains."""
    prepared = [
        "--name",
        "typed",
        "--launcher",
        "none",
        "--nodes",
        "2",
        "--processes",
        "2",
        "--master-addr",
        "n1",
    ]
    said = site.start("run", *ARGUMENTS, *prepared).wait(120)
    assert said.code == 0, said
    lines = [line.partition("  ")[2] for line in said.out.splitlines() if re.match("node [01]  cd ", line)]
    assert len(lines) == 2

    def type_on_each(*added: str) -> list[Result]:
        typed = [
            line.replace("&& dstrain ", f"&& {shlex.join(dstrain_argv())} ") + words
            for line, words in zip(lines, added, strict=True)
        ]
        running = [
            site.cluster.start(host, ["sh", "-c", line], env=site.environment)
            for host, line in zip(("n1", "n2"), typed, strict=True)
        ]
        return [command.wait(200) for command in running]

    for refused in type_on_each("", " --lr 0.5"):
        assert refused.code not in (0, None) and "n2 has a different plan than n1" in refused.err, refused
    assert site.numbers("typed") == []
    for trained in type_on_each("", ""):
        assert trained.code == 0, f"{trained}\n{site.log('typed')}"
    assert site.numbers("typed") == local


@pytest.mark.heavy
@pytest.mark.parametrize("launcher", ["torchrun", "openmpi"])
@pytest.mark.usefixtures("cluster")
def test_another_launcher_over_ssh(site: Placement, local: list[dict[str, Any]], launcher: str) -> None:
    if launcher == "openmpi":
        require_cluster(openmpi=True)
    site.run(launcher, "--hostfile", "hosts", "--launcher", launcher, *HOOKS)
    check_hooks(site.folder(launcher), ["n1", "n1", "n2", "n2"], STEPS)
    assert site.hosts_of_ranks(launcher) == ["n1", "n1", "n2", "n2"]
    assert site.numbers(launcher) == local
    site.nothing_is_left()


@pytest.mark.heavy
@pytest.mark.usefixtures("cluster")
def test_three_hosts(site: Placement) -> None:
    """A replica on each host, with two stages."""
    three = ["--data-parallel", "3", "--global-batch", "12"]
    (site.place / "three").write_text("".join(f"{name} slots=2\n" for name in site.cluster.names))
    site.run("near-three", *three)
    site.run("three", *three, "--hostfile", "three")
    assert site.hosts_of_ranks("three") == ["n1", "n1", "n2", "n2", "n3", "n3"]
    assert site.numbers("three") == site.numbers("near-three")
    site.nothing_is_left()


@pytest.mark.heavy
def test_a_job_of_several_hosts_is_used_without_a_word(
    slurm_site: Placement, local: list[dict[str, Any]]
) -> None:
    """sbatch with a `dstrain run` in it: no hostfile, no launcher."""
    slurm = slurm_site.slurm
    assert slurm is not None
    command = shlex.join(dstrain_argv("run", *ARGUMENTS, "--name", "slurm", *HOOKS))
    job = slurm_site.batch(f"exec {command}", "--nodes=2", "--ntasks-per-node=2")
    slurm.wait_for(job, "COMPLETED", "FAILED", seconds=200)
    said = (slurm_site.place / f"job-{job}.log").read_text()
    assert slurm.state(job) == "COMPLETED", slurm_site.log("slurm")
    assert slurm_site.hosts_of_ranks("slurm") == ["n1", "n1", "n2", "n2"]
    assert slurm_site.numbers("slurm") == local
    check_hooks(slurm_site.folder("slurm"), ["n1", "n1", "n2", "n2"], STEPS)
    assert f"launcher slurm: job {job} has the hosts n1 (2), n2 (2)" in said
    slurm_site.nothing_is_left()


@pytest.mark.heavy
def test_a_killed_rank_of_a_job_ends_it_and_is_named(slurm_site: Placement) -> None:
    slurm, folder = slurm_site.slurm, slurm_site.folder("killed")
    assert slurm is not None
    arguments = [*ARGUMENTS, "--steps", "400", "--name", "killed"]
    command = shlex.join(dstrain_argv("run", *arguments))
    job = slurm_site.batch(f"exec {command}", "--nodes=2", "--ntasks-per-node=2")
    wait_until(
        lambda: complete_checkpoints(folder.checkpoints) or slurm.state(job) == "FAILED",
        120,
        what="a checkpoint",
    )
    status = folder.read_status(3)
    assert status is not None and (status.host, status.state) == ("n2", "running"), slurm_site.log("killed")
    [victim] = [process for process in slurm_site.cluster.processes("n2") if process.pid == status.pid]
    assert slurm_site.cluster.kill("n2", victim)
    slurm.wait_for(job, "FAILED", seconds=END_SECONDS)
    said = (slurm_site.place / f"job-{job}.log").read_text()
    assert "rank 3 on n2: " in said and "SIGKILL" in said
    assert "continues from step-" in said
    slurm_site.nothing_is_left()


# What the pods train: enough steps to be killed in.
CONFIG: dict[str, Any] = {
    "model": "model",
    "data": "text.jsonl",
    "zero": 2,
    "pipeline": 2,
    "data_parallel": 2,
    "seq_len": 32,
    "global_batch": 8,
    "micro_batch": 2,
    "save_every": 2,
    "validation": 0.2,
    "sample_tokens": 0,
    "steps": 200,
}


class Pods:
    """The pods of launch/kubernetes.yaml, each on a host that bears its name, with the volume as its folder.

    What Kubernetes does is done here: JOB_COMPLETION_INDEX is filled in, the image's entry point stands before the
    arguments, the Service's names lead to the pods. Eight GPUs become two processes.
    """

    def __init__(self, site: Placement, repository: Path, volume: Path) -> None:
        self._site, self._volume = site, volume
        text = (repository / "launch" / "kubernetes.yaml").read_text()
        found = {one["kind"]: one for one in yaml.safe_load_all(text)}
        job = found["Job"]
        self._pod = job["spec"]["template"]["spec"]
        [self._container] = self._pod["containers"]
        assert self._container["args"].count("--processes=8") == 1
        self.hosts = site.cluster.names[: job["spec"]["completions"]]
        for number, host in enumerate(self.hosts):
            name = f"{job['metadata']['name']}-{number}.{found['Service']['metadata']['name']}"
            line = f"{site.cluster.address(host)} {name}\n"
            for other in site.cluster.names:
                with (site.cluster.folder / "etc" / other / "hosts").open("a") as file:
                    file.write(line)

    def start(self, number: int) -> Command:
        """What the kubelet of this pod's node starts."""
        argv = ["dstrain", *self._container["args"]]
        argv = [word.replace("$(JOB_COMPLETION_INDEX)", str(number)) for word in argv]
        argv[argv.index("--processes=8")] = "--processes=2"
        return self._site.cluster.start(
            self.hosts[number], argv, env=self._site.environment, cwd=self._volume
        )


@pytest.mark.heavy
def test_kubernetes_yaml(
    environment: dict[str, str],
    materials: Path,
    repository: Path,
    tmp_path: Path,
) -> None:
    """Both pods end, on both hosts, when one loses a rank or is evicted; those that replace them go on."""
    volume, bin_ = tmp_path / "work", tmp_path / "bin"
    for folder in (volume, bin_):
        folder.mkdir()
    write_dstrain(bin_)
    lay_out(materials, volume)
    (volume / "train.yaml").write_text(json.dumps(CONFIG))
    path = f"{bin_}{os.pathsep}{environment['PATH']}"
    with Cluster(tmp_path / "cluster", 2) as cluster:
        site = Placement(cluster, None, {**environment, "PATH": path}, volume)
        pods = Pods(site, repository, volume)
        running = [pods.start(number) for number in (1, 0)]
        folder = site.folder("train")
        wait_until(
            lambda: complete_checkpoints(folder.checkpoints) or not all(pod.running() for pod in running),
            120,
            what="a checkpoint",
        )
        status = folder.read_status(3)
        assert status is not None and status.state == "running", running[0].err
        [victim] = [process for process in cluster.processes("n2") if process.pid == status.pid]
        assert cluster.kill("n2", victim)
        ends = [pod.wait(2 * END_SECONDS) for pod in running]
        assert all(end.code not in (0, 2, 75) for end in ends), ends
        assert "rank 3 on n2" in ends[0].err and "SIGKILL" in ends[0].err, ends[0]
        site.nothing_is_left()
        assert len(site.numbers("train")) < CONFIG["steps"], "the kill came too late to test anything"

        # Evicted: its node tells one of them, and both leave in order. The rest is trained by the next two.
        running = [pods.start(number) for number in (0, 1)]
        before = site.numbers("train")[-1]["step"]
        wait_until(
            lambda: site.numbers("train")[-1]["step"] != before or not all(pod.running() for pod in running),
            120,
            what="a step",
        )
        running[1].terminate()
        for pod in running:
            said = pod.wait(2 * END_SECONDS)
            assert said.code == RESUMABLE and "which is saved" in said.err, f"{said}\n{site.log('train')}"
        assert len(site.numbers("train")) < CONFIG["steps"], "the end came too late to test anything"
        for pod in [pods.start(number) for number in (0, 1)]:
            said = pod.wait(200)
            assert said.code == 0, f"{said}\n{site.log('train')}"
        said = site.start("run", "--config", "train.yaml", "--name", "undisturbed").wait(200)
        assert said.code == 0, said
        assert len(site.numbers("train")) > CONFIG["steps"]
        assert site.numbers("train") == site.numbers("undisturbed")


def test_a_shell_that_has_outlived_its_job(slurm_site: Placement) -> None:
    """Its variables lead nowhere: `plan` and `run` say so before anything is started."""
    assert slurm_site.slurm is not None
    argv = ["salloc", "--nodes=2", "--ntasks-per-node=2", "env"]
    kept = slurm_site.slurm.run(argv, env=slurm_site.environment, cwd=slurm_site.place).out
    left = dict(line.split("=", 1) for line in kept.splitlines() if line.startswith("SLURM_"))
    purged = {"SLURM_JOB_ID": "4711"}  # Slurm forgets a job minutes after its end
    for more, reason in (({}, "COMPLETED"), (purged, "Invalid job id")):
        variables = slurm_site.environment | left | more
        for command in ("plan", "run"):
            argv = dstrain_argv(command, *ARGUMENTS)
            said = slurm_site.cluster.run("n1", argv, env=variables, cwd=slurm_site.place)
            errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
            assert said.code == 2 and len(errors) == 1, said
            assert reason in said.err and "salloc" in said.err and "--launcher local" in said.err, said


@pytest.mark.heavy
def test_slurm_sbatch(slurm_site: Placement, local: list[dict[str, Any]], repository: Path) -> None:
    """launch/slurm.sbatch as it stands there; only the numbers of ranks and GPUs are those of these hosts."""
    slurm, place = slurm_site.slurm, slurm_site.place
    assert slurm is not None
    shutil.copy(slurm_site.folder("local").config, place / "train.yaml")
    (place / "venv" / "bin").mkdir(parents=True)
    write_dstrain(place / "venv" / "bin")
    (place / "venv" / "bin" / "activate").write_text(f"PATH={place}/venv/bin:$PATH\n")
    script = shutil.copy(repository / "launch" / "slurm.sbatch", place)
    argv = ["sbatch", "--parsable", "--ntasks-per-node=2", "--gpus-per-node=2", script]
    said = slurm.run(argv, env=slurm_site.environment, cwd=place)
    assert said.code == 0, said
    job = said.out.strip()
    slurm.wait_for(job, "COMPLETED", "FAILED", seconds=200)
    assert slurm.state(job) == "COMPLETED", (place / f"slurm-{job}.log").read_text()
    assert slurm_site.hosts_of_ranks("train") == ["n1", "n1", "n2", "n2"]
    assert slurm_site.numbers("train") == local
    slurm_site.nothing_is_left()


def write_dstrain(folder: Path) -> None:
    """The command, as an installation would put it into this folder."""
    script = folder / "dstrain"
    script.write_text(f'#!/bin/sh\nexec {shlex.join(dstrain_argv())} "$@"\n')
    script.chmod(0o755)
