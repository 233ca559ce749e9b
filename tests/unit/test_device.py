"""Which GPU a rank takes, and what `deterministic` sets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from dstrain.errors import DstrainError
from dstrain.train import device
from dstrain.train.device import device_number, take_device
from dstrain.train.rank_environment import rank_variables

TASK = {"SLURM_PROCID": "7", "SLURM_NTASKS": "8", "SLURM_LOCALID": "3", "SLURM_NTASKS_PER_NODE": "4"}

# the variables of a rank, the GPUs that it sees, the one that it takes
SEEN: dict[str, tuple[dict[str, str], int, int | None]] = {
    "all GPUs of the host": (TASK, 4, 3),
    "more than there are ranks": (TASK, 8, 3),
    "--gpus-per-task=1": (TASK | {"SLURM_GPUS_PER_TASK": "1"}, 1, 0),
    "--gpus-per-task=1, which binds nothing here": (TASK | {"SLURM_GPUS_PER_TASK": "1"}, 4, 3),
    "--gpus-per-task=2": (TASK | {"SLURM_GPUS_PER_TASK": "2"}, 2, 0),
    "--gpu-bind=single:1": (TASK | {"SLURM_GPU_BIND": "single:1"}, 1, 0),
    "--tres-per-task=gres/gpu:1": (TASK | {"SLURM_TRES_PER_TASK": "cpu=2,gres/gpu:1"}, 1, 0),
    "one of four on the host": (TASK | {"SLURM_GPUS_ON_NODE": "4"}, 1, 0),
    "one for all ranks": (TASK | {"SLURM_GPUS_ON_NODE": "1"}, 1, None),
    "cores for each task": (TASK | {"SLURM_TRES_PER_TASK": "cpu=2", "SLURM_GPU_BIND": "none"}, 1, None),
    "none at all": (TASK | {"SLURM_GPUS_PER_TASK": "1"}, 0, None),
    "another launcher": ({"RANK": "3", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "4"}, 4, 3),
    "another launcher in a job": (
        {
            "RANK": "3",
            "LOCAL_RANK": "3",
            "LOCAL_WORLD_SIZE": "4",
            "WORLD_SIZE": "4",
            "SLURM_GPUS_ON_NODE": "8",
        },
        *(1, None),
    ),
    "DeepSpeed's launcher": ({"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}, 2, 1),
}


@pytest.mark.parametrize("case", SEEN)
def test_the_gpu_of_a_rank(case: str) -> None:
    variables, visible, taken = SEEN[case]
    environ = variables | rank_variables(variables)
    if taken is not None:
        assert device_number(environ, visible) == taken
        return
    with pytest.raises(DstrainError, match="local rank 3 has no GPU: this process sees") as caught:
        device_number(environ, visible)
    assert "--gpus-per-task=1" in (caught.value.hint or "")


def test_deepspeed_is_told_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    gpu = SimpleNamespace(device_name=lambda: "cuda", device_count=lambda: 1, set_device=taken.append)
    monkeypatch.setattr(device, "get_accelerator", lambda: gpu)
    for name, value in (
        TASK | {"SLURM_GPUS_PER_TASK": "1", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}
    ).items():
        monkeypatch.setenv(name, value)
    take_device()
    assert taken == [0] and os.environ["LOCAL_RANK"] == "0"
    gpu.device_count = lambda: 4
    monkeypatch.setenv("LOCAL_RANK", "3")
    take_device()
    assert taken == [0, 3] and os.environ["LOCAL_RANK"] == "3"


def test_ranks_on_cpus_keep_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    cpu = SimpleNamespace(device_name=lambda: "cpu", device_count=lambda: 1, set_device=taken.append)
    monkeypatch.setattr(device, "get_accelerator", lambda: cpu)
    for name, value in (TASK | {"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}).items():
        monkeypatch.setenv(name, value)
    take_device()
    assert taken == [3] and os.environ["LOCAL_RANK"] == "3"


def test_deterministic_fills_no_memory() -> None:
    """In a process of its own: what it sets is for the whole process."""
    code = """
import json, torch
from dstrain.train.device import be_deterministic
be_deterministic()
print(json.dumps([
    torch.are_deterministic_algorithms_enabled(),
    torch.utils.deterministic.fill_uninitialized_memory,
    bool(torch.empty(4096).isnan().all()),
]))
"""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout.splitlines()[-1]) == [True, False, False]
