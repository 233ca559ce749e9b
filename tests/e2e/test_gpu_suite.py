"""The suite for machines with GPUs, tried where there is none: its harness on a CPU, its plans for cards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import dstrain
from tests.gpu.test_models import LAYOUTS, config_of
from tests.support.gpu.machine import ON_CPU
from tests.support.materials import write_sums

CASE = "zero1-pp1 and fp32-adamw-clip0.5-tied-accum4]"


def start(
    folder: Path, repository: Path, *words: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", *words]
    return subprocess.run(
        [*command, "--rootdir", str(repository), str(repository / "tests" / "gpu")],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(repository)} | environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


@pytest.mark.heavy
def test_a_result_names_what_it_is_of(tmp_path: Path, repository: Path) -> None:
    done = start(tmp_path, repository, "-k", CASE, **{ON_CPU: "1", "DS_ACCELERATOR": "cpu"})
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu-results.json").read_text())
    assert found["cards"] == ["CPU"] and found["dstrain"] == dstrain.__version__ and found["torch"]
    passed, skipped = sorted(found["results"], key=lambda result: result["outcome"])
    assert passed["outcome"] == "passed" and 0 < passed["difference"]["loss"] < 1e-5
    assert skipped["reason"] == "needs 2 GPUs, and there are 1"


@pytest.mark.heavy
def test_without_a_gpu_nothing_passes_and_nothing_is_skipped(tmp_path: Path, repository: Path) -> None:
    done = start(tmp_path, repository, "-k", CASE, DS_ACCELERATOR="cuda")
    assert done.returncode == 1 and "asks for GPUs, but none is visible" in done.stdout, (
        done.stdout + done.stderr
    )
    assert "passed" not in done.stdout and "skipped" not in done.stdout
    assert not (tmp_path / "gpu-results.json").exists()


@pytest.mark.heavy
def test_a_large_card_holds_a_layout_of_each_model(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ON_CPU, "1")
    corpus = write_sums(place / "corpus.txt")
    for model, layouts in LAYOUTS.items():
        verdicts = [
            dstrain.plan(
                config_of(model, choices, corpus, place), device="h200", gpus_per_node=1
            ).memory_verdict
            for choices in layouts
        ]
        assert any(verdict.startswith(("fits", "tight")) for verdict in verdicts), (model, verdicts)
