"""`--restarts --elastic`: a run that lost a host goes on with fewer replicas, and with all when the host is back."""

from __future__ import annotations

import math
import signal
from pathlib import Path

import pytest

from dstrain.runs.checkpoint.manifest import newest_complete, read_manifest
from dstrain.runs.run_folder import RunFolder, read_metrics
from tests.support.cluster.commands import Command, dstrain_argv
from tests.support.cluster.hosts import Cluster
from tests.support.cluster.runs import lay_out
from tests.support.cluster.waiting import wait_until

pytestmark = [pytest.mark.timeout(600), pytest.mark.heavy]

STEPS = 40
ARGUMENTS = [
    *("--model", "model", "--data", "text.jsonl", "--zero", "2", "--data-parallel", "3", "--seq-len", "32"),
    *("--global-batch", "12", "--micro-batch", "2", "--steps", str(STEPS), "--save-every", "2"),
    *("--set", "validation=0.2", "--set", "sample_tokens=0", "--set", "eval_every=10"),
]


def replicas_of_newest(folder: RunFolder) -> int | None:
    """How many replicas made the newest checkpoint."""
    newest = newest_complete(folder.checkpoints)
    return read_manifest(newest)["identity"]["data_parallel"] if newest else None


def wait_for_checkpoint(folder: RunFolder, command: Command, *, replicas: int) -> None:
    wait_until(
        lambda: replicas_of_newest(folder) == replicas or not command.running(),
        200,
        what=f"a checkpoint of {replicas} replicas",
    )
    assert command.running(), f"{command.out}{command.err}"


def losses(folder: RunFolder) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in read_metrics(folder.metrics) if "loss" in record}


def test_it_goes_on_with_two_hosts_and_then_with_three(
    cluster: Cluster, environment: dict[str, str], materials: Path, tmp_path: Path
) -> None:
    lay_out(materials, tmp_path)
    (tmp_path / "hosts").write_text("n1 slots=1\nn2 slots=1\nn3 slots=1\n")
    near = dstrain_argv("run", *ARGUMENTS, "--name", "near")
    said = cluster.run("n1", near, env=environment, cwd=tmp_path, timeout=200)
    assert said.code == 0, said

    folder = RunFolder(tmp_path / "runs" / "far")
    far = dstrain_argv(
        *("run", *ARGUMENTS, "--name", "far", "--hostfile", "hosts", "--restarts", "3", "--elastic")
    )
    command = cluster.start("n1", far, env=environment, cwd=tmp_path)
    wait_for_checkpoint(folder, command, replicas=3)
    cluster.crash("n3")
    wait_for_checkpoint(folder, command, replicas=2)
    cluster.revive("n3")
    status = folder.read_status(1)
    assert status is not None and status.host == "n2"
    [victim] = [process for process in cluster.processes("n2") if process.pid == status.pid]
    assert cluster.kill("n2", victim, signal.SIGKILL)
    end = command.wait(300)
    assert end.code == 0, end

    assert (
        "elastic on n1, n2: 12 samples per step = 2 per micro-batch x 3 micro-batches x 2 replicas" in end.out
    )
    assert "without n3: " in end.out
    statuses = [folder.read_status(rank) for rank in range(3)]
    assert [(status.host, status.state) for status in statuses if status] == [
        (host, "done") for host in cluster.names
    ]
    assert replicas_of_newest(folder) == 3
    expected, found = losses(RunFolder(tmp_path / "runs" / "near")), losses(folder)
    assert sorted(found) == sorted(expected) == list(range(1, STEPS + 1))
    # fp32 sums in another order while there were two replicas.
    assert all(math.isclose(found[step], expected[step], rel_tol=1e-5) for step in expected)
