"""Joining the world compiles nothing and leaves nothing behind."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed

from tests.support.distributed.workers import run

SHARED_MEMORY = Path("/dev/shm")


def join(rank: int, extensions: str) -> float:
    os.environ |= {"TORCH_EXTENSIONS_DIR": extensions, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}
    from dstrain.engine.build import start_communication

    start_communication()
    total = torch.tensor(float(rank + 1))
    torch.distributed.all_reduce(total)
    return float(total)


def test_no_operator_is_compiled_and_shared_memory_is_left_as_it_was(tmp_path: Path) -> None:
    before = {path.name for path in SHARED_MEMORY.iterdir()}
    assert run(2, join, str(tmp_path)) == [3.0, 3.0]
    assert list(tmp_path.iterdir()) == []
    left = {path.name for path in SHARED_MEMORY.iterdir()} - before
    assert not [name for name in left if name.startswith("deepspeed")]
