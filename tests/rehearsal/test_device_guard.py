"""The guard is built once for a torch, and where it can't be built, the message says what is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

LOAD = "from dstrain.rehearsal.device_guard import load_device_guard; load_device_guard()"
USE = f"""
{LOAD}
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from dstrain.rehearsal.fake_cuda import FakeGpu, FakeMemory, install_fake_cuda
fake_tensors = FakeTensorMode()
install_fake_cuda(FakeGpu("a GPU", 2**30, (9, 0), 1), FakeMemory(), print)
with fake_tensors:
    weight = torch.ones(3, 3, device="cuda", requires_grad=True)
    (torch.ones(2, 3, device="cuda") @ weight).sum().backward()
    assert weight.grad.device == torch.device("cuda", 0), weight.grad.device
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_it_is_built_once_and_lets_a_backward_pass_run_on_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    done = run(USE, DSTRAIN_CACHE=str(tmp_path))
    assert done.returncode == 0, done.stderr
    libraries = list((tmp_path / "rehearsal").iterdir())
    assert len(libraries) <= 1  # none with a torch that was built for GPUs
    for library in libraries:
        before = library.stat().st_mtime_ns
        again = run(LOAD, DSTRAIN_CACHE=str(tmp_path), PATH="")
        assert again.returncode == 0, again.stderr
        assert library.stat().st_mtime_ns == before
        assert list((tmp_path / "rehearsal").iterdir()) == [library]


def test_a_process_with_a_fake_gpu_ends_as_it_wants() -> None:
    """Of those whose backward pass ran in a thread of its own, every second one was aborted."""
    wanted = f"{USE}\nimport sys; sys.exit(3)"
    with ThreadPoolExecutor(4) as pool:
        ended = list(pool.map(run, [wanted] * 4))
    assert [(process.returncode, process.stderr) for process in ended] == [(3, "")] * 4


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"PATH": ""}, ("a C++ compiler is needed: none is installed", "apt-get install g++")),
        ({"CXX": "no-such-compiler"}, ("CXX: there is no program 'no-such-compiler'", "CXX=PROGRAM")),
        ({"CXX": "false"}, ("could not build the fake device against torch", "a compiler that knows C++20")),
    ],
)
def test_what_is_missing_is_said(environment: dict[str, str], words: tuple[str, ...], tmp_path: Path) -> None:
    import torch

    if torch.version.cuda or torch.version.hip:
        pytest.skip("this torch brings its own guard")
    done = run(LOAD, DSTRAIN_CACHE=str(tmp_path), **environment)
    assert done.returncode != 0
    for part in words:
        assert part in done.stderr
    assert not list(tmp_path.rglob("*.so")) and not list(tmp_path.rglob("*.part"))
