"""Models of real size, trained for a few steps with random weights: memory, time and MFU beside the plan's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import dstrain
from dstrain.report.measured import hold_against
from dstrain.runs.run_folder import RunFolder
from tests.support.gpu.machine import device_names, need
from tests.support.materials import write_sums

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

STEPS = 6
LAYOUTS: dict[str, list[dict[str, Any]]] = {
    "llama-1b": [
        {"zero": 1},
        {"zero": 1, "activation_checkpointing": True},
        {"zero": 2},
        {"zero": 3},
    ],
    # What a single card holds depends on the card: the first that fits is trained.
    "llama-8b": [
        {"zero": 3},
        {"zero": 3, "activation_checkpointing": True},
        {"zero": 1, "optimizer": "sgd", "activation_checkpointing": True},
    ],
}
OFF_BY = 0.1
"""Of the memory that was measured; PyTorch's allocator rounds what the plan counts exactly."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sums(tmp_path_factory.mktemp("corpus") / "corpus.txt")


def config_of(model: str, choices: dict[str, Any], corpus: Path, runs: Path) -> dstrain.ResolvedConfig:
    """Rows of 4096 tokens in bf16, on all cards as replicas."""
    cards = len(device_names())
    common = {
        "model": model,
        "data": str(corpus),
        "tokenizer": "bytes",
        "data_parallel": cards,
        "precision": "bf16",
        "seq_len": 4096,
        "micro_batch": 1,
        "global_batch": 4 * cards,
        "steps": STEPS,
        "eval_every": 0,
        "save_every": "never",
        "sample_tokens": 0,
        "runs_dir": str(runs),
        "name": "measured",
    }
    return dstrain.load_config(flags={**common, **choices})


def train(config: dstrain.ResolvedConfig, record_property: pytest.RecordProperty) -> None:
    """Train, and hold the memory against the plan. Time rests on data sheets: it is recorded."""
    held = hold_against(RunFolder(dstrain.run(config).folder))
    time, step = held.plan.time, held.row("a step")
    record_property("rows", held.to_record()["rows"])
    if time is not None and step.measured:
        record_property("mfu", time.mfu * time.total / step.measured)
    difference = held.row("memory of the fullest rank").difference
    assert difference is not None and abs(difference) < OFF_BY, held.to_record()


@pytest.mark.parametrize(
    "choices", LAYOUTS["llama-1b"], ids=lambda choices: "-".join(map(str, choices.values()))
)
def test_a_model_of_1b(
    choices: dict[str, Any], corpus: Path, tmp_path: Path, record_property: pytest.RecordProperty
) -> None:
    need(1)
    config = config_of("llama-1b", choices, corpus, tmp_path)
    verdict = dstrain.plan(config).memory_verdict
    if verdict.startswith("does not fit"):
        pytest.skip(verdict)
    train(config, record_property)


def test_a_model_of_8b(corpus: Path, tmp_path: Path, record_property: pytest.RecordProperty) -> None:
    need(1)
    verdict = ""
    for choices in LAYOUTS["llama-8b"]:
        config = config_of("llama-8b", choices, corpus, tmp_path)
        verdict = dstrain.plan(config).memory_verdict
        if not verdict.startswith("does not fit"):
            record_property("choices", choices)
            train(config, record_property)
            return
    pytest.skip(verdict)
