"""Two hosts without a disk in common: run folder and cache are each host's own, the user's files are on both."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dstrain.runs.run_folder import RunFolder
from tests.support.cluster.commands import Result, dstrain_argv
from tests.support.cluster.hosts import Cluster
from tests.support.cluster.needs import require_cluster
from tests.support.cluster.runs import lay_out, numbers
from tests.support.sampling import full, heavy

pytestmark = pytest.mark.timeout(400)

ARGUMENTS = [
    *("--model", "model", "--data", "text.jsonl", "--zero", "1", "--pipeline", "2", "--seq-len", "32"),
    *("--global-batch", "8", "--micro-batch", "2", "--steps", "5"),
    *("--set", "validation=0.2", "--set", "sample_tokens=4"),
]


class Apart:
    """Hosts n1 and n2, and the folder that a user's commands stand in."""

    def __init__(self, cluster: Cluster, place: Path, environment: dict[str, str]) -> None:
        self.cluster, self.place, self._environment = cluster, place, environment

    def run(self, name: str, *arguments: str, slots: int = 1, hostfile: bool = True) -> Result:
        """Two stages and ``slots`` replicas, on both hosts or on n1 alone."""
        where = ["--hostfile", f"hosts-{slots}"] if hostfile else []
        layout = ["--data-parallel", str(slots), *where]
        argv = dstrain_argv("run", *ARGUMENTS, "--name", name, *layout, *arguments)
        said = self.cluster.run("n1", argv, env=self._environment, cwd=self.place, timeout=200)
        left = [process for host in self.cluster.names for process in self.cluster.processes(host)]
        assert not left, "a run that has ended leaves nothing behind"
        return said

    def resume(self, name: str) -> Result:
        return self.cluster.run(
            "n1", dstrain_argv("resume", name), env=self._environment, cwd=self.place, timeout=60
        )

    def folder(self, host: str, name: str) -> RunFolder:
        """A run's folder as this host has it."""
        return RunFolder(self.cluster.seen(host, self.place / "runs" / name))

    def numbers(self, name: str) -> list[dict[str, Any]]:
        return numbers(self.folder("n1", name))


@pytest.fixture(scope="module")
def apart(
    environment: dict[str, str], materials: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Apart]:
    require_cluster()
    place = tmp_path_factory.mktemp("apart")
    lay_out(materials, place)
    for slots in (1, 2):
        (place / f"hosts-{slots}").write_text(f"n1 slots={slots}\nn2 slots={slots}\n")
    own = [place / "runs", place / "cache"]
    for folder in own:
        folder.mkdir()
    with Cluster(tmp_path_factory.mktemp("hosts") / "cluster", 2, own_folders=own) as cluster:
        yield Apart(cluster, place, environment | {"DSTRAIN_CACHE": str(place / "cache")})


# With two ranks on each host, one of them tokenizes there and the other waits for it.
@pytest.mark.parametrize("slots", [*heavy(2), *full(1)])
def test_without_checkpoints_it_trains_as_on_one_host(apart: Apart, slots: int) -> None:
    """The plan travels, and n2 tokenizes by itself."""
    near, far = f"near-{slots}", f"far-{slots}"
    said = apart.run(near, slots=slots, hostfile=False)
    assert said.code == 0, said
    said = apart.run(far, "--save-every", "never", slots=slots)
    assert said.code == 0, said
    assert "no checkpoint (save_every: never)" in said.out
    assert len(apart.numbers(near)) == 6
    assert apart.numbers(far) == apart.numbers(near)
    here, there = apart.folder("n1", far), apart.folder("n2", far)
    assert there.plan.read_text() == here.plan.read_text()
    first, last = 0, 2 * slots - 1
    assert here.rank_log(first).exists() and not here.rank_log(last).exists()
    assert there.rank_log(last).exists() and not there.rank_log(first).exists()
    assert here.metrics.exists() and not there.metrics.exists()
    assert not here.checkpoints.exists() and not there.checkpoints.exists()
    assert list(apart.cluster.seen("n2", apart.place / "cache").rglob("tokens.bin"))
    resumed = apart.resume(far)
    assert resumed.code == 0 and "has finished its 5 steps" in resumed.out, resumed


def test_with_checkpoints_it_is_refused_before_it_trains(apart: Apart) -> None:
    said = apart.run("refused")
    assert said.code == 1, said
    words = said.err.replace("\n", " ")
    assert "n2 does not share the run folder of n1" in words
    assert f"({os.fspath(apart.place)}/runs/refused)" in words
    assert "--set runs_dir=FOLDER" in words and "--save-every never" in words
    assert apart.numbers("refused") == []


@pytest.mark.heavy  # tests/unit/test_run_data.py has the words
def test_a_host_without_the_data_is_named(apart: Apart) -> None:
    """What n1 has in a folder of its own, n2 hasn't."""
    data = apart.place / "cache" / "only-here.jsonl"
    apart.cluster.seen("n1", data).write_text((apart.place / "text.jsonl").read_text())
    said = apart.run("without", "--data", str(data), "--save-every", "never")
    assert said.code == 1, said
    words = said.err.replace("\n", " ")
    assert "rank 1 on n2: " in words and str(data) in words and "copy what is missing" in words
    assert apart.numbers("without") == []
