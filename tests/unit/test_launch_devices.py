from __future__ import annotations

import stat
from pathlib import Path

import pytest

from dstrain.errors import DstrainError
from dstrain.launch.devices import Devices, local_devices

TWO = "0, GPU-aaaa, NVIDIA H100 80GB HBM3, 81559\n1, GPU-bbbb, NVIDIA A100, 40960\n"
MIB = 2**20


@pytest.fixture
def smi(tmp_path: Path):
    """Put a fake nvidia-smi that prints ``answer`` into PATH."""

    def install(answer: str, code: int = 0) -> dict[str, str]:
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\nprintf '%s' '{answer}'\nexit {code}\n")
        tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
        return {"PATH": f"{tmp_path}:/usr/bin:/bin"}

    return install


@pytest.fixture(autouse=True)
def own_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tool is looked up in this process's PATH: never the machine's own one."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")


@pytest.mark.parametrize(
    ("chosen", "ids"),
    [
        (None, (0, 1)),
        ("0", (0,)),
        ("1,0", (1, 0)),
        (" 1 , 0 ", (1, 0)),
        ("GPU-bb", (1,)),
        ("1,-1,0", (1,)),
        ("0,7,1", (0,)),
    ],
)
def test_visible(smi, chosen: str | None, ids: tuple[int, ...]) -> None:
    environ = smi(TWO) | ({} if chosen is None else {"CUDA_VISIBLE_DEVICES": chosen})
    found = local_devices(environ)
    assert (found.kind, found.count, found.ids) == ("cuda", len(ids), ids)
    assert found.memory_bytes == min((81559, 40960)[i] for i in ids) * MIB
    assert found.names == tuple(("NVIDIA H100 80GB HBM3", "NVIDIA A100")[i] for i in ids)


@pytest.mark.parametrize("chosen", ["", "-1", "NoDevFiles", "GPU-cc", "GPU-"])
def test_nothing_visible(smi, chosen: str) -> None:
    assert local_devices(smi(TWO) | {"CUDA_VISIBLE_DEVICES": chosen}).kind == "cpu"


def test_memory_not_told(smi) -> None:
    found = local_devices(smi("0, GPU-aaaa, NVIDIA GB10, [N/A]\n"))
    assert found == Devices("cuda", 1, ("NVIDIA GB10",), None, (0,))


@pytest.mark.parametrize(("answer", "code"), [("No devices were found\n", 0), (TWO, 9), ("", 0)])
def test_no_gpus(smi, answer: str, code: int) -> None:
    found = local_devices(smi(answer, code))
    assert (found.kind, found.count) == ("cpu", 0)
    assert found.memory_bytes is None or found.memory_bytes > 2**28


def test_cpu_is_asked_for(smi) -> None:
    assert local_devices(smi(TWO) | {"DS_ACCELERATOR": "cpu"}).kind == "cpu"


def test_refused(smi) -> None:
    with pytest.raises(DstrainError, match="not on 'xpu'"):
        local_devices(smi(TWO) | {"DS_ACCELERATOR": "xpu"})
    with pytest.raises(DstrainError, match="none is visible"):
        local_devices(smi("") | {"DS_ACCELERATOR": "cuda"})
    with pytest.raises(DstrainError, match="MIG"):
        local_devices(smi(TWO) | {"CUDA_VISIBLE_DEVICES": "MIG-1234"})
