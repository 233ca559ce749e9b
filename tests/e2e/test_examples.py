"""Every example does what it says, shortened."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.conftest import Said

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
YAML = sorted(path.name for path in EXAMPLES.glob("*.yaml"))
SHORT = (
    "--steps",
    "4",
    "--eval-every",
    "2",
    "--sample-tokens",
    "0",
    "--data",
    "text.jsonl",
    "--seq-len",
    "32",
)

Dstrain = Callable[..., Said]


@pytest.fixture
def examples(place: Path) -> Path:
    for path in EXAMPLES.iterdir():
        if path.is_file():
            shutil.copyfile(path, place / path.name)
    return place


def validation(said: Said) -> list[float]:
    return [float(number) for number in re.findall(r"validation(?: loss)? +(\d+\.\d+)", said.out)]


@pytest.mark.parametrize(
    "name", [name for name in YAML if name not in ("continue-pretraining.yaml", "early-stopping.yaml")]
)
def test_a_recipe_trains(name: str, examples: Path, dstrain: Dstrain) -> None:
    said = dstrain("run", "--config", name, *SHORT, "--set", "validation=0.25", "--set", "warmup_steps=1")
    assert said.code == 0, said.out + said.err
    losses = validation(said)
    assert losses[-1] < losses[0], "it learns"
    assert list((examples / "runs").glob("*/checkpoints/step-000004"))


def test_an_exported_model_is_trained_on(examples: Path, dstrain: Dstrain) -> None:
    options = (*SHORT, "--set", "validation=0.25")
    first = dstrain("run", "--config", "zero-and-pipeline.yaml", *options)
    assert first.code == 0, first.out + first.err
    exported = dstrain("export", "zero-and-pipeline", "my-model")
    assert exported.code == 0, exported.err
    second = dstrain("run", "--config", "continue-pretraining.yaml", *options)
    assert second.code == 0, second.out + second.err
    assert validation(second)[0] == pytest.approx(validation(exported)[0], abs=2e-4)


def test_a_hook_of_ones_own_stops_the_run(examples: Path, dstrain: Dstrain) -> None:
    said = dstrain(
        "run", "--config", "early-stopping.yaml", *SHORT, "--steps", "400", "--eval-every", "1", "--lr", "1e-12",
        "--set", "validation=0.25", "--name", "stopped",
    )  # fmt: skip
    assert said.code == 75, said.out + said.err
    assert "which is saved" in said.err
    steps = len((examples / "runs/stopped/metrics.jsonl").read_text().splitlines())
    assert 3 < steps < 100
    assert list((examples / "runs/stopped/tensorboard").rglob("events.out.tfevents*"))


SHORTENED = """
import dstrain
_load = dstrain.load_config
SHORT = ("data=text.jsonl", "seq_len=32", "validation=0.25", "warmup_steps=1")
dstrain.load_config = lambda **choices: _load(**choices, settings=SHORT)
"""


def python(examples: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run code that calls the Python API, on less data and with shorter rows than the quickstart has."""
    return subprocess.run(
        [sys.executable, "-c", SHORTENED + code],
        cwd=examples,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.heavy
def test_the_script_compares_two_layouts(examples: Path) -> None:
    done = python(examples, "import compare_layouts; assert compare_layouts.main(3) < 1e-5")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\n") == 5, "the table, and nothing that the product prints"


def test_the_notebook_runs_from_top_to_bottom(examples: Path) -> None:
    cells = json.loads((examples / "plan_and_train.ipynb").read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) + "\n" for cell in cells if cell["cell_type"] == "code")
    assert not any(cell.get("outputs") for cell in cells), "outputs of somebody's machine"
    done = python(examples, code)
    assert done.returncode == 0, done.stdout + done.stderr
    for words in ("fits", "hint: --zero 1", "20 steps, validation loss", "24 "):
        assert words in done.stdout, done.stdout
