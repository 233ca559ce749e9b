"""The devices of this machine: asked of NVML, of nvidia-smi without it; what can't be believed is an error."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dstrain.errors import DstrainError
from dstrain.launch import gpus
from dstrain.launch.devices import Devices, local_devices
from dstrain.launch.gpus import Driver, Gpu, ask_driver
from tests.support.nvml import A100, H100, MIB, NvmlModule, build_library, built_in, no_gpu_built_in

TWO = "0, GPU-aaaa, 570.86.15, 81559, NVIDIA H100 80GB HBM3\n1, GPU-bbbb, 570.86.15, 40960, NVIDIA A100-SXM4-40GB\n"
NVIDIA_GPU = ("0x10de", "0x030200")
Ask = Callable[..., dict[str, str]]


@pytest.fixture(autouse=True)
def nothing_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither this machine's tools and libraries nor its GPUs: each test says what there is."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setitem(sys.modules, "amdsmi", None)
    no_gpu_built_in(tmp_path, monkeypatch)


@pytest.fixture
def smi(tmp_path: Path) -> Ask:
    """Put a fake nvidia-smi that prints ``answer`` into PATH; nvidia-ml-py is not installed."""

    def install(answer: str, code: int = 0, before: str = "") -> dict[str, str]:
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\n{before}\nprintf '%s' '{answer}'\nexit {code}\n")
        tool.chmod(0o755)
        return {"PATH": f"{tmp_path}:/usr/bin:/bin"}

    return install


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Ask:
    """Put a fake NVML in place of nvidia-ml-py's; there is no nvidia-smi."""

    def install(*arguments: Any, **more: Any) -> dict[str, str]:
        monkeypatch.setitem(sys.modules, "pynvml", NvmlModule(*arguments, **more))
        return {"PATH": "/none"}

    return install


def refused(environ: dict[str, str]) -> DstrainError:
    with pytest.raises(DstrainError) as caught:
        local_devices(environ)
    assert "DS_ACCELERATOR=cpu" in (caught.value.hint or "")
    return caught.value


# --- what is visible


@pytest.mark.parametrize("way", ["nvml", "smi"])
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
def test_visible(smi: Ask, nvml: Ask, way: str, chosen: str | None, ids: tuple[int, ...]) -> None:
    environ = nvml() if way == "nvml" else smi(TWO)
    found = local_devices(environ | ({} if chosen is None else {"CUDA_VISIBLE_DEVICES": chosen}))
    assert (found.kind, found.count, found.ids) == ("cuda", len(ids), ids)
    assert found.memory_bytes == min((81559, 40960)[i] for i in ids) * MIB
    assert found.names == tuple((H100[1], A100[1])[i] for i in ids)


@pytest.mark.parametrize("chosen", ["", "-1", "NoDevFiles", "GPU-cc", "GPU-", "2"])
def test_gpus_of_which_none_is_visible(nvml: Ask, chosen: str) -> None:
    error = refused(nvml() | {"CUDA_VISIBLE_DEVICES": chosen})
    assert error.where == "CUDA_VISIBLE_DEVICES"
    assert error.message == f"{chosen!r} names none of this machine's GPUs, which are 0 to 1"
    assert (
        local_devices({"PATH": "/none", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": chosen}).kind
        == "cpu"
    )


@pytest.mark.parametrize("chosen", ["", "0"])
def test_none_visible_of_no_gpus(chosen: str) -> None:
    assert local_devices({"PATH": "/none", "CUDA_VISIBLE_DEVICES": chosen}).kind == "cpu"


def test_what_the_driver_says(smi: Ask, nvml: Ask) -> None:
    environ = smi(TWO)
    gpus_there = (Gpu(0, H100[0], H100[1], 81559 * MIB), Gpu(1, A100[0], A100[1], 40960 * MIB))
    assert ask_driver(environ) == Driver(gpus_there, "570.86.15")
    assert ask_driver(nvml()) == Driver(gpus_there, "570.86.15", (12, 8))
    assert ask_driver(nvml(cuda=13000, version=b"580.1")) == Driver(gpus_there, "580.1", (13, 0))


def test_nvml_is_left_as_it_was(nvml: Ask) -> None:
    local_devices(nvml())
    assert sys.modules["pynvml"].open == 0  # type: ignore[attr-defined]


def test_gpus_of_another_job_are_not_counted(nvml: Ask) -> None:
    """A control group that lets a Slurm job have one of two GPUs: CUDA counts that one as 0."""
    found = local_devices(nvml([NvmlModule.NVML_ERROR_NO_PERMISSION, A100]))
    assert (found.count, found.ids, found.names) == (1, (0,), (A100[1],))


def test_memory_not_told(smi: Ask, nvml: Ask) -> None:
    shared = Devices("cuda", 1, ("NVIDIA GB10",), None, (0,))
    assert local_devices(smi("0, GPU-aaaa, 580.1, [N/A], NVIDIA GB10\n")) == shared
    assert local_devices(nvml([("GPU-aaaa", "NVIDIA GB10", None)])) == shared


# --- no GPUs, and no answer


def test_no_gpus(smi: Ask, nvml: Ask) -> None:
    """No driver; its tools without it, as on a login node; a driver without a GPU."""
    for environ in (
        {"PATH": "/none"},
        smi("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n", 9),
        smi("No devices were found\n"),
        smi("No devices were found\n", 6),
        smi(""),
        nvml([]),
        nvml(init=NvmlModule.NVML_ERROR_DRIVER_NOT_LOADED),
        nvml(init=NvmlModule.NVML_ERROR_LIBRARY_NOT_FOUND),
    ):
        found = local_devices(environ)
        assert (found.kind, found.count) == ("cpu", 0)
        assert found.memory_bytes is None or found.memory_bytes > 2**28


@pytest.mark.parametrize(
    ("answer", "code", "said"),
    [
        (TWO, 9, "says '1, GPU-bbbb"),
        ("No devices were found\n", 0, "shows this process none"),
        ("", 0, "shows this process none"),
    ],
)
def test_gpus_that_only_the_kernel_sees(tmp_path: Path, smi: Ask, answer: str, code: int, said: str) -> None:
    built_in(tmp_path, NVIDIA_GPU, ("0x10de", "0x040300"), ("0x1af4", "0x030000"), ("0x10de", "0x030000"))
    error = refused(smi(answer, code))
    assert "this machine has 2 NVIDIA GPUs that can't be used: " in error.message and said in error.message
    assert "--gpus-per-node" in (error.hint or "")


@pytest.mark.parametrize(
    ("init", "loaded", "said"),
    [
        (NvmlModule.NVML_ERROR_DRIVER_NOT_LOADED, 0, "the driver is installed, but not loaded"),
        (
            NvmlModule.NVML_ERROR_LIBRARY_NOT_FOUND,
            1,
            "libnvidia-ml.so.1 is not found, and there is no nvidia-smi",
        ),
        (None, 1, "the driver shows this process none"),
    ],
)
def test_gpus_that_nvml_does_not_show(
    tmp_path: Path, nvml: Ask, init: int | None, loaded: int, said: str
) -> None:
    built_in(tmp_path, *[NVIDIA_GPU] * (not loaded), loaded=loaded)
    error = refused(nvml([], init=init))
    assert "this machine has 1 NVIDIA GPU that can't be used: " in error.message and said in error.message
    assert "--gpus all" in (error.hint or "")


def test_a_container_without_its_gpus(tmp_path: Path) -> None:
    """No library and no tool, but the host's driver shows in /proc."""
    built_in(tmp_path, loaded=8)
    assert (
        "8 NVIDIA GPUs that can't be used: nvidia-ml-py is not installed"
        in refused({"PATH": "/none"}).message
    )


def test_graphics_without_a_driver_for_computing(tmp_path: Path, nvml: Ask) -> None:
    """A laptop with another driver, and nothing of NVIDIA's installed."""
    built_in(tmp_path, ("0x8086", "0x030000"), ("0x1002", "0x030000"), ("0x10de", "0x030000"))
    assert local_devices({"PATH": "/none"}).kind == "cpu"
    assert local_devices(nvml(init=NvmlModule.NVML_ERROR_LIBRARY_NOT_FOUND)).kind == "cpu"


@pytest.mark.parametrize(
    ("answer", "code", "said"),
    [
        (
            "Unable to determine the device handle for GPU0000:01:00.0: GPU is lost.\n",
            15,
            "exit code 15 and said 'Un",
        ),
        ("Failed to initialize NVML: Driver/library version mismatch\n", 18, "version mismatch"),
        ("<html>\n", 0, "said '<html>' in place of a GPU"),
        ("0, GPU-aaaa\n", 0, "in place of a GPU"),
        (TWO + "x, GPU-c, 1, 2, y\n", 0, "said 'x, GPU-c"),
        ("", 1, "exit code 1 and said 'nothing'"),
    ],
)
def test_nvidia_smi_that_fails_or_says_something_else(smi: Ask, answer: str, code: int, said: str) -> None:
    error = refused(smi(answer, code))
    assert "NVIDIA's driver can't be asked for the GPUs" in error.message and said in error.message


@pytest.mark.parametrize(
    "more",
    [
        {"init": NvmlModule.NVML_ERROR_LIB_RM_VERSION_MISMATCH},
        {"gpus": [H100, NvmlModule.NVML_ERROR_GPU_IS_LOST]},
        {"gpus": [(7, "x", 3)]},
        {"version": None},
        {"cuda": "twelve"},
    ],
)
def test_nvml_that_fails_or_says_something_else(nvml: Ask, more: dict[str, Any]) -> None:
    assert "NVIDIA's driver can't be asked for the GPUs" in refused(nvml(**more)).message


def test_a_driver_that_hangs(smi: Ask, nvml: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "DRIVER_SECONDS", 0.2)
    for environ in (smi(TWO, before="exec sleep 100"), nvml(seconds=30)):
        started = time.monotonic()
        assert "did not answer within 0 s" in refused(environ).message
        assert time.monotonic() - started < 20


def test_a_driver_that_is_slow(smi: Ask, nvml: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight GPUs that nothing keeps awake answered after more than the 10 s that were given once."""
    assert gpus.DRIVER_SECONDS >= 60
    for environ in (smi(TWO, before="sleep 0.3"), nvml(seconds=0.3)):
        assert local_devices(environ).count == 2


# --- what the user asks for


def test_cpu_is_asked_for(smi: Ask, nvml: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then nothing is asked: not a driver that hangs, nor AMD's."""
    built_in(tmp_path, NVIDIA_GPU, loaded=1)
    monkeypatch.setattr(
        "dstrain.launch.devices.ask_driver", lambda environ: pytest.fail("the driver was asked")
    )
    monkeypatch.setattr("dstrain.launch.devices.amd_gpus", lambda: pytest.fail("AMD was asked"))
    for environ in (smi(TWO), nvml()):
        assert local_devices(environ | {"DS_ACCELERATOR": "cpu"}).kind == "cpu"


def test_refused(nvml: Ask) -> None:
    with pytest.raises(DstrainError, match="not on 'xpu'"):
        local_devices(nvml() | {"DS_ACCELERATOR": "xpu"})
    with pytest.raises(DstrainError, match="MIG"):
        local_devices(nvml() | {"CUDA_VISIBLE_DEVICES": "MIG-1234"})
    with pytest.raises(DstrainError, match="none is visible"):
        local_devices(nvml([]) | {"DS_ACCELERATOR": "cuda"})


def test_gpus_of_amd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        sys.modules,
        "amdsmi",
        SimpleNamespace(
            amdsmi_init=lambda: None,
            amdsmi_shut_down=lambda: None,
            amdsmi_get_processor_handles=lambda: [1, 2],
            amdsmi_get_gpu_asic_info=lambda handle: {"market_name": "AMD Instinct MI300X"},
        ),
    )
    error = refused({"PATH": "/none"})
    assert "has 2 GPUs of AMD's (AMD Instinct MI300X), on which dstrain does not run" in error.message
    monkeypatch.setattr(sys.modules["amdsmi"], "amdsmi_get_processor_handles", lambda: 1 / 0)
    assert local_devices({"PATH": "/none"}).kind == "cpu"


# --- NVIDIA's own module, with a library in place of the driver's

ASKED = """
from dstrain.launch import gpus
gpus.DRIVER_SECONDS = 5
try:
    print(gpus.ask_driver())
except Exception as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("library", "said"),
    [
        (
            {},
            "Driver(gpus=(Gpu(index=0, uuid='GPU-aaaa', name='NVIDIA H100 80GB HBM3', memory_bytes=85520809984), ",
        ),
        ({"init": 18}, "NVML says 'RM has detected an NVML/RM version mismatch.'"),
        ({"init": 12}, "libnvidia-ml.so.1 is not found"),
        ({"seconds": 30}, "NVIDIA's driver did not answer within 5 s"),
    ],
)
def test_nvidias_own_module(tmp_path: Path, repository: Path, library: dict[str, int], said: str) -> None:
    folder = build_library(tmp_path / "driver", **library)
    patch = (
        f"from pathlib import Path\nfrom dstrain.launch import gpus\ngpus._LOADED = Path({str(tmp_path)!r})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", patch + ASKED],
        cwd=repository,
        env={**os.environ, "LD_LIBRARY_PATH": str(folder), "PATH": "/none"},
        capture_output=True,
        text=True,
        check=True,
        timeout=25,
    )
    assert said in done.stdout, done
    if not library:
        assert done.stdout.endswith("version='570.86.15', cuda=(12, 8))\n")
