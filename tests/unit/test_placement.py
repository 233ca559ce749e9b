"""Where a run goes: a hostfile, Slurm's allocation, nodes that dstrain is typed on, or this machine."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from dstrain.api.preflight import node_of
from dstrain.config.loader import ResolvedConfig, load_config
from dstrain.errors import DstrainError
from dstrain.launch import placement as placement_module
from dstrain.launch.allocation import Allocation, names_of, slurm_allocation, why_ended
from dstrain.launch.devices import Devices
from dstrain.launch.placement import Placement, find_placement
from dstrain.planning.layout import Host

CPU = Devices("cpu", 0, (), None)
GPUS = Devices("cuda", 4, ("NVIDIA L4",) * 4, None, (0, 1, 2, 3))
JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-3]"}


@pytest.fixture(autouse=True)
def _srun(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm's commands are there, whatever this machine has, and the job goes on."""
    monkeypatch.setattr(placement_module, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(placement_module, "why_ended", lambda job: None)


@pytest.mark.parametrize("flags", [{}, {"launcher": "slurm"}])
def test_variables_of_a_job_and_no_srun(flags: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A container or a shell that has kept them: a rank's launcher would say that srun is not found."""
    monkeypatch.setattr(placement_module, "which", lambda name: None)
    left = {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "gpu07", "SLURM_TASKS_PER_NODE": "1"}
    with pytest.raises(DstrainError) as caught:
        find_placement(config(**flags), CPU, left)
    assert "srun is not in PATH" in caught.value.message and "--launcher local" in (caught.value.hint or "")
    assert find_placement(config(launcher="local"), CPU, left) == Placement((), "local")
    here = left | {"SLURM_JOB_NODELIST": socket.gethostname()}
    if not flags:
        assert find_placement(config(), CPU, here) == Placement((), "local")


def config(**flags: Any) -> ResolvedConfig:
    return load_config(recipe=None, config_file=None, settings=(), flags=flags)


@pytest.mark.parametrize(
    ("variables", "slots"),
    [
        ({"SLURM_TASKS_PER_NODE": "8(x3)", "SLURM_NTASKS_PER_NODE": "8"}, [8, 8, 8]),
        ({"SLURM_TASKS_PER_NODE": "2(x2),1"}, [2, 2, 1]),
        ({"SLURM_TASKS_PER_NODE": "1(x3)", "SLURM_GPUS_ON_NODE": "4"}, [4, 4, 4]),
        (
            {"SLURM_TASKS_PER_NODE": "1(x3)", "SLURM_GPUS_ON_NODE": "4", "SLURM_NTASKS_PER_NODE": "1"},
            [1, 1, 1],
        ),
        ({"SLURM_TASKS_PER_NODE": "2(x3)", "SLURM_GPUS_ON_NODE": "4"}, [2, 2, 2]),
        ({"SLURM_TASKS_PER_NODE": "1(x3)"}, [1, 1, 1]),
    ],
)
def test_slots_of_an_allocation(variables: dict[str, str], slots: list[int]) -> None:
    found = slurm_allocation(JOB | variables, lambda _: ["n1", "n2", "n3"])
    assert found == Allocation("7", tuple(Host(f"n{n}", count) for n, count in enumerate(slots, 1)))


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"SLURM_TASKS_PER_NODE": "8(x3)", "SLURM_GPUS_ON_NODE": "4"}, "8 tasks per node, but 4 GPUs"),
        ({"SLURM_TASKS_PER_NODE": "4(x3)", "SLURM_GPUS_ON_NODE": "4", "SLURM_GPUS_PER_TASK": "1"}, None),
        ({"SLURM_TASKS_PER_NODE": "2(x3)", "SLURM_GPUS_ON_NODE": "4"}, None),
        ({"SLURM_TASKS_PER_NODE": "2(x3)"}, None),
    ],
)
def test_tasks_that_would_share_a_gpu(
    variables: dict[str, str], message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = [f"n{number}" for number in (1, 2, 3)]
    found = slurm_allocation(JOB | variables, lambda _: hosts)
    monkeypatch.setattr(placement_module, "slurm_allocation", lambda environ: found)
    for flags in ({}, {"launcher": "slurm"}):
        assert find_placement(config(**flags), CPU, JOB | variables).launcher == "slurm"
        if message is None:
            assert find_placement(config(**flags), GPUS, JOB | variables).launcher == "slurm"
            continue
        with pytest.raises(DstrainError, match=message) as caught:
            find_placement(config(**flags), GPUS, JOB | variables)
        assert "--gpus-per-task=1" in (caught.value.hint or "") and caught.value.where == "Slurm job 7"


@pytest.mark.parametrize("devices", [CPU, GPUS], ids=lambda devices: devices.kind)
def test_tasks_per_gpu_and_per_node(devices: Devices, monkeypatch: pytest.MonkeyPatch) -> None:
    """srun: "fatal: --ntasks-per-node is mutually exclusive with --ntasks-per-gpu and SLURM_NTASKS_PER_GPU"."""
    found = Allocation("7", (Host("n1", 4), Host("n2", 4)))
    monkeypatch.setattr(placement_module, "slurm_allocation", lambda environ: found)
    for flags in ({}, {"launcher": "slurm"}):
        with pytest.raises(DstrainError, match="submitted with --ntasks-per-gpu") as caught:
            find_placement(config(**flags), devices, JOB | {"SLURM_NTASKS_PER_GPU": "1"})
        assert "--gpus-per-task=1" in (caught.value.hint or "")
    assert (
        find_placement(config(launcher="local"), devices, JOB | {"SLURM_NTASKS_PER_GPU": "1"}).launcher
        == "local"
    )


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"SLURM_JOB_ID": "7"}, "SLURM_JOB_NODELIST is not"),
        (JOB | {"SLURM_TASKS_PER_NODE": "2(x2)"}, "lists 3 hosts, but task counts for 2"),
        (JOB | {"SLURM_TASKS_PER_NODE": "two"}, "SLURM_TASKS_PER_NODE is 'two'"),
    ],
)
def test_variables_that_are_not_whole(variables: dict[str, str], message: str) -> None:
    with pytest.raises(DstrainError, match=message.replace("(", r"\(")):
        slurm_allocation(variables, lambda _: ["n1", "n2", "n3"])


def test_no_allocation_and_no_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert slurm_allocation({}) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DstrainError, match="scontrol is not in PATH"):
        names_of("n[1-2]")
    # A container inside a job may have no tool of Slurm, and stays on its host.
    found = slurm_allocation(JOB | {"SLURM_JOB_NODELIST": "gpu-07", "SLURM_TASKS_PER_NODE": "2"})
    assert found is not None and found.hosts == (Host("gpu-07", 2),)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("echo RUNNING", None),
        ("echo COMPLETED; echo RUNNING", None),
        ("echo COMPLETED", "COMPLETED"),
        ("echo TIMEOUT; echo CANCELLED", "TIMEOUT, CANCELLED"),
        ("echo slurm_load_jobs error: Invalid job id specified >&2; exit 1", "Invalid job id specified"),
        ("echo squeue: error: no DNS >&2; echo squeue: fatal: no source >&2; exit 1", "fatal: no source"),
        ("echo slurm_load_jobs error: Unable to contact slurm controller >&2; exit 1", None),
        ("", None),
    ],
)
def test_a_job_that_has_ended(
    answer: str, reason: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    squeue = tmp_path / "squeue"
    squeue.write_text(f"#!/bin/sh\n{answer}\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    said = why_ended("7")
    assert (said is None) == (reason is None) and (reason or "") in (said or "")
    monkeypatch.setattr(placement_module, "why_ended", why_ended)
    left = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "gpu07", "SLURM_TASKS_PER_NODE": "1"}
    if said is None:
        assert find_placement(config(), CPU, left).launcher == "slurm"
        return
    for flags in ({}, {"launcher": "slurm"}):
        with pytest.raises(DstrainError, match="job 7, in which Slurm can't start anything") as caught:
            find_placement(config(**flags), CPU, left)
        assert said in caught.value.message and "--launcher local" in (caught.value.hint or "")
    assert find_placement(config(launcher="local"), CPU, left) == Placement((), "local")


@pytest.fixture
def in_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    allocation = Allocation("7", (Host("192.0.2.1", 2), Host("192.0.2.2", 2)))
    monkeypatch.setattr(placement_module, "slurm_allocation", lambda environ: allocation)


@pytest.mark.usefixtures("in_a_job")
def test_a_job_of_several_hosts_is_taken_unless_told_otherwise(tmp_path: Path) -> None:
    chosen = find_placement(config(), CPU)
    assert (chosen.launcher, len(chosen.hosts)) == ("slurm", 2)
    assert chosen.told is not None and "job 7 has the hosts 192.0.2.1 (2), 192.0.2.2 (2)" in chosen.told
    assert find_placement(config(launcher="slurm"), CPU) == Placement(chosen.hosts, "slurm")
    assert find_placement(config(launcher="local"), CPU) == Placement((), "local")
    (tmp_path / "hosts").write_text("192.0.2.3 slots=4\n")
    assert find_placement(config(hostfile=str(tmp_path / "hosts")), CPU) == Placement(
        (Host("192.0.2.3", 4),), "pdsh"
    )


def test_a_job_of_this_host_alone_is_local(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Allocation("7", (Host(socket.gethostname(), 2),))
    monkeypatch.setattr(placement_module, "slurm_allocation", lambda environ: own)
    assert find_placement(config(), CPU) == Placement((), "local")
    assert find_placement(config(launcher="slurm"), CPU) == Placement(own.hosts, "slurm")


def test_this_machine(tmp_path: Path) -> None:
    assert find_placement(config(), CPU, {}) == Placement((), "local")
    (tmp_path / "hosts").write_text("localhost slots=4\n")
    assert find_placement(config(hostfile=str(tmp_path / "hosts")), CPU, {}) == Placement(
        (Host("localhost", 4),), "local"
    )
    with pytest.raises(DstrainError, match="no Slurm allocation"):
        find_placement(config(launcher="slurm"), CPU, {})


def test_nodes_are_the_same_whoever_asks() -> None:
    wanted = config(launcher="none", nodes=2, processes=4, master_addr="a", name="x")
    assert find_placement(wanted, CPU) == Placement((Host("node-0", 4), Host("node-1", 4)), "none")
    assert find_placement(config(launcher="none", name="x"), Devices("cuda", 8, (), None)) == Placement(
        (Host("node-0", 8),), "none"
    )
    assert [node_of(wanted, rank) for rank in (None, 0, 1)] == [None, 0, 1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"launcher": "pdsh"}, "requires a hostfile"),
        ({"launcher": "openmpi"}, "requires a hostfile"),
        ({"nodes": 2}, "nodes is only for --launcher none"),
        ({"processes": 2, "launcher": "pdsh"}, "processes is only for --launcher none"),
        ({"launcher": "none", "nodes": 2, "processes": 2}, "requires --master-addr"),
        ({"launcher": "none"}, "on machines without GPUs"),
        ({"launcher": "none", "hostfile": "hosts"}, "can't be used with a hostfile"),
        ({"launcher": "none", "processes": 2, "master_addr": "-oProxyCommand=x"}, "master_addr"),
        ({"launcher": "none", "processes": 2, "master_addr": "a;b"}, "master_addr"),
        ({"master_port": 65536}, "master_port"),
        ({"launcher": "slurm", "hostfile": "hosts"}, "in Slurm's order"),
    ],
)
def test_choices_that_contradict_each_other(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(DstrainError) as refused:
        find_placement(config(**flags), CPU, {})
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("flags", "rank", "message"),
    [
        ({"launcher": "none"}, 0, "the same run name"),
        ({"name": "x"}, 0, "is only for --launcher none"),
        ({"launcher": "none", "name": "x", "nodes": 2}, 2, "no node 2 among 2"),
    ],
)
def test_the_number_of_a_node(flags: dict[str, Any], rank: int, message: str) -> None:
    with pytest.raises(DstrainError, match=message):
        node_of(config(**flags), rank)
