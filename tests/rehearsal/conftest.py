"""A rehearsal through the Python API, of GPUs that no machine of the tests has."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

import dstrain
from dstrain.api.rehearsing import RehearsalResult

Rehearse = Callable[..., RehearsalResult]


@pytest.fixture(scope="session")
def rehearse(tmp_path_factory: pytest.TempPathFactory) -> Rehearse:
    """``rehearse(stages=.., gpus_per_node=.., KEY=..)``: on H100 GPUs, in bf16; the data are enough for long rows."""
    data = tmp_path_factory.mktemp("data") / "text.jsonl"
    text = "what is said here is read by nobody " * 100
    data.write_text("".join(json.dumps({"text": f"{number} {text}"}) + "\n" for number in range(200)))

    def run(*, stages: Any = None, gpus_per_node: int = 8, **choices: Any) -> RehearsalResult:
        flags = {"data": str(data), "tokenizer": "bytes", "precision": "bf16", "validation": 0.1}
        config = dstrain.load_config(**{**flags, **choices})
        return dstrain.rehearse(config, device="h100-80g", gpus_per_node=gpus_per_node, stages=stages)

    return run
