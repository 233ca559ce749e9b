"""Devices by name and from files, the machines that ``--device`` describes, and whether a plan fits on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dstrain.api.machines import Elsewhere, elsewhere, find_machines
from dstrain.config.files import ds_configs
from dstrain.config.loader import load_config
from dstrain.errors import DstrainError
from dstrain.estimate.device import PRECISIONS, cpu_device, device_like, find_device, known_devices
from dstrain.estimate.memory import StageMemory, memory_needed, memory_verdict
from dstrain.launch.devices import local_devices, processor
from dstrain.planning.layout import Host, Layout
from dstrain.planning.plan import Machines, Plan
from tests.support.plans import MINIMAL, plan

GB = 10**9


# --- one device


@pytest.mark.parametrize("name", known_devices())
def test_every_device_s_numbers_are_plausible(name: str) -> None:
    """A slip of a power of ten in a file would show here."""
    found = find_device(name, "--device")
    assert found.name == name and found.kind == "cuda" and found.source
    assert found.memory_bytes is not None and 12 * GB < found.memory_bytes < 300 * GB
    assert 5e12 < found.flops["fp32"] < 2e14 and 5e13 < found.flops["fp16"] < 5e15
    assert found.flops["fp16"] > found.flops["fp32"] and 0.2 < found.utilisation <= 0.6
    assert 2e11 < found.memory_bandwidth < 1e13
    assert (
        found.inside.bandwidth >= found.between.bandwidth > 0.3e9 and 1e10 < found.host_link.bandwidth < 1e11
    )
    assert 1e-6 < found.inside.latency <= found.between.latency < 1e-3
    assert 1 <= found.gpus_per_node <= 8 and 1e-5 < found.layer_overhead < 1e-2
    assert found.precisions == tuple(precision for precision in PRECISIONS if precision in found.flops)


def test_what_the_data_sheets_say() -> None:
    h100, a100, t4 = (find_device(name, "--device") for name in ("h100-80g", "a100-80g", "t4"))
    assert (a100.flops["bf16"], a100.flops["fp32"], a100.inside.bandwidth) == (312e12, 19.5e12, 300e9)
    assert (h100.flops["bf16"], h100.memory_bandwidth, h100.between.bandwidth) == (989.4e12, 3350e9, 50e9)
    assert t4.precisions == ("fp32", "fp16")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["NVIDIA H100 80GB HBM3"] * 8, "h100-80g"),
        (["NVIDIA A100-SXM4-40GB"], "a100-40g"),
        (["Tesla V100-SXM2-16GB"], "v100-16g"),
        (["NVIDIA L4"], "l4"),  # not the L40S, whose name begins alike
        (["NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-40GB"], None),
        (["NVIDIA"], None),
        ([], None),
    ],
)
def test_device_like(names: list[str], expected: str | None) -> None:
    found = device_like(names)
    assert (found.name if found else None) == expected


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("h100", "did you mean h100-80g?"),
        ("a100_80g", "did you mean a100-80g?"),
        ("H200 ", "h200"),
        ("", "known: "),
    ],
)
def test_unknown_device(name: str, hint: str) -> None:
    with pytest.raises(DstrainError, match="unknown device") as caught:
        find_device(name, "--device")
    assert caught.value.where == "--device" and hint in (caught.value.hint or "")


def device_file(folder: Path, change: dict[str, Any], leave_out: str = "") -> Path:
    values = yaml.safe_load((ds_configs() / "devices" / "h200.yaml").read_text())
    for key, value in change.items():
        first, _, second = key.partition(".")
        if second:
            values[first][second] = value
        else:
            values[first] = value
    values.pop(leave_out, None)
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def test_a_file_of_the_user_s(tmp_path: Path) -> None:
    path = device_file(tmp_path, {"utilisation": 0.3, "teraflops": {"bf16": 1000}, "names": []})
    found = find_device(str(path), "--device")
    assert (found.name, found.utilisation, found.precisions) == ("mine", 0.3, ("bf16",))


def test_a_file_for_cpus(tmp_path: Path) -> None:
    path = device_file(tmp_path, {"kind": "cpu", "gpus_per_node": 4, "memory_mib": 16384})
    found = machines_of(Elsewhere(str(path)), nodes=2)
    assert (found.accelerator, found.slots) == ("cpu", 8)
    made = plan(machines=found, pipeline=2, global_batch=32)
    assert made.time is not None and made.layout.data_parallel == 4
    assert "the ranks of a host need" in made.memory_verdict
    with pytest.raises(DstrainError, match="kind must be cuda, or cpu"):
        find_device(str(device_file(tmp_path, {"kind": "tpu"})), "--device")


@pytest.mark.parametrize(
    ("change", "message", "hint"),
    [
        ({"utilization": 0.4}, "unknown key 'utilization'", "did you mean utilisation?"),
        (
            {"inside.gigabits_per_second": 4},
            "unknown key 'inside.gigabits_per_second'",
            "gigabytes_per_second",
        ),
        ({"teraflops.fp8": 4}, "unknown key 'teraflops.fp8'", "did you mean fp"),
        ({"memory_mib": "80 GB"}, "memory_mib = '80 GB': must be a whole number above 0", ""),
        ({"memory_mib": True}, "memory_mib = True: must be a whole number", ""),
        (
            {"between.latency_microseconds": -1},
            "between.latency_microseconds = -1: must be a number above 0",
            "",
        ),
        ({"utilisation": 45}, "utilisation must be a fraction", "0.45"),
        ({"inside": 450}, "inside must contain gigabytes_per_second, latency_microseconds", "indent"),
        ({"names": "H200"}, "names = 'H200': must be a list", ""),
        ({"teraflops": {}}, "teraflops lists no precision", "fp32"),
        ({"source": 3}, "source = 3: must be a text", ""),
    ],
)
def test_a_wrong_file(tmp_path: Path, change: dict[str, Any], message: str, hint: str) -> None:
    path = device_file(tmp_path, change)
    with pytest.raises(DstrainError) as caught:
        find_device(str(path), "--device")
    assert message in caught.value.message and hint in (caught.value.hint or "")
    assert str(caught.value.where).startswith(str(path))


def test_a_file_that_lacks_something(tmp_path: Path) -> None:
    with pytest.raises(DstrainError, match="memory_gigabytes_per_second is missing"):
        find_device(str(device_file(tmp_path, {}, leave_out="memory_gigabytes_per_second")), "--device")
    with pytest.raises(DstrainError, match="there is no file"):
        find_device(str(tmp_path / "other.yaml"), "--device")


def test_the_processor_that_is_here() -> None:
    here = local_devices({"DS_ACCELERATOR": "cpu"})
    found = processor(here.precisions)
    assert found.cores >= 1 and 5e8 < found.hertz < 1e10
    assert set(found.flops_a_cycle) == set(here.precisions)
    device = cpu_device(
        here.names[0], cores=4, hertz=2e9, flops_a_cycle={"fp32": 32.0}, memory_bytes=here.memory_bytes
    )
    assert device.flops["fp32"] == 4 * 2e9 * 32 and device.precisions == ("fp32",)


# --- machines


def machines_of(described: Elsewhere | None, **flags: Any) -> Machines:
    return find_machines(load_config(config_file=str(MINIMAL), flags=flags), described)[2]


def test_machines_that_are_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dstrain.api.machines.local_devices", lambda: pytest.fail("looked for a GPU"))
    found = machines_of(Elsewhere("a100-40g"), nodes=3)
    assert found.hosts == tuple(Host(f"node-{number}", 8) for number in range(3))
    assert (found.accelerator, found.memory_bytes) == ("cuda", 40960 * 2**20)
    assert found.device is not None and found.device.name == "a100-40g"
    assert machines_of(Elsewhere("t4", 2)).hosts == (Host("node-0", 2),)
    made = plan(machines=found, precision="bf16", pipeline=4, global_batch=48)
    assert made.layout.world_size == 24 and made.device == "a100-40g" and made.time is not None
    assert made.memory_bytes == found.memory_bytes and made.memory_verdict.startswith("fits: ")


def test_a_plan_with_its_time_goes_through_json() -> None:
    made = plan(machines=machines_of(Elsewhere("h200", 4)), precision="bf16", pipeline=2, zero=2)
    assert made.time is not None and made.time.traffic and made.time.assumptions
    record = json.loads(json.dumps(made.to_record()))
    assert Plan.from_record(record) == made
    assert record["stage_memory"][0]["total"] == made.stage_memory[0].total
    assert record["time"]["traffic"][0]["reason"] and record["device"] == "h200"


def test_a_hostfile_of_machines_that_are_not_here(tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("alpha slots=4\nbeta slots=4\n")
    found = machines_of(Elsewhere("h200"), hostfile=str(hostfile))
    assert found.hosts == (Host("alpha", 4), Host("beta", 4))
    for more, flag in (({"nodes": 2}, "--nodes 2"), ({}, "--gpus-per-node 8")):
        described = Elsewhere("h200", None if more else 8)
        with pytest.raises(DstrainError, match=f"and {flag} both set the hosts and their slots"):
            machines_of(described, hostfile=str(hostfile), **more)


@pytest.mark.parametrize(
    ("described", "flags", "message", "where"),
    [
        (Elsewhere("cpu"), {}, "the speed of CPUs varies", "--device"),
        (Elsewhere("h200"), {"processes": 4, "launcher": "none"}, "one rank on each GPU", "--processes"),
        (Elsewhere("h200"), {"nodes": 50_000}, "exceed the limit of 100,000 devices", "--nodes"),
        (Elsewhere("h200", 10**6), {}, "exceed the limit of 100,000 devices", "--gpus-per-node"),
        (None, {"nodes": 2}, "nodes is only for --launcher none", "--nodes"),
    ],
)
def test_machines_that_contradict(
    described: Elsewhere | None, flags: dict[str, Any], message: str, where: str
) -> None:
    with pytest.raises(DstrainError) as caught:
        machines_of(described, **flags)
    assert message in caught.value.message and caught.value.where == where and caught.value.hint


def test_flags_of_machines_go_together() -> None:
    assert elsewhere(None, None) is None
    assert elsewhere("h200", 4) == Elsewhere("h200", 4)
    with pytest.raises(DstrainError, match="--gpus-per-node requires --device"):
        elsewhere(None, 4)


def test_a_precision_that_the_device_lacks() -> None:
    with pytest.raises(DstrainError, match="this t4 can't compute in bf16") as caught:
        plan(machines=machines_of(Elsewhere("t4")), precision="bf16")
    assert caught.value.hint == "--precision fp32 or fp16"


# --- whether it fits


def needs(*gigabytes: float) -> tuple[StageMemory, ...]:
    return tuple(StageMemory(0, 0, round(each * GB), 0, 0, 0, 0) for each in gigabytes)


@pytest.mark.parametrize(
    ("stages", "memory", "expected"),
    [
        ((40, 50), 100, "fits: a rank of stage 1 needs about 50.0 GB of the 92.0 GB that can be filled of 100.0 GB"),
        ((90, 50), 100, "tight: a rank of stage 0 needs about 90.0 GB of the 92.0 GB"),
        ((50, 93), 100, "does not fit: a rank of stage 1 needs about 93.0 GB of the 92.0 GB"),
        ((10,), None, ""),
    ],
)  # fmt: skip
def test_verdict(stages: tuple[float, ...], memory: int | None, expected: str) -> None:
    made = Layout((Host("a", len(stages)),), len(stages), 1, tuple(range(len(stages) + 1)))
    found = memory_verdict(made, needs(*stages), memory and memory * GB, "cuda")
    assert found.startswith(expected) and bool(found) == bool(expected)
    if expected.startswith("does not fit"):
        assert found.endswith("1.0 GB too much")


def test_ranks_on_cpus_add_up() -> None:
    made = Layout((Host("a", 4),), 2, 2, (0, 1, 2))
    assert memory_needed(made, needs(3, 5), "cpu") == (16 * GB, 1)
    assert memory_verdict(made, needs(3, 5), round(16.5 * GB), "cpu").startswith(
        "does not fit: the ranks of a host"
    )
    assert memory_needed(made, needs(3, 5), "cuda") == (5 * GB, 1)
