"""`dstrain reproduce`: bit-equal, or the first number that is another and the thing that was changed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dstrain.runs.run_folder import RunFolder
from tests.support.e2e import Said

pytestmark = pytest.mark.timeout(300)

ARGUMENTS = [
    *("--model", "model", "--data", "mine.jsonl", "--zero", "1", "--pipeline", "2", "--steps", "4"),
    *("--seq-len", "32", "--global-batch", "4", "--micro-batch", "1", "--set", "eval_every=2"),
    *("--set", "validation=0.2", "--set", "sample_tokens=0", "--save-every", "0", "--name", "first"),
]


@pytest.fixture(scope="module")
def text(materials: Path) -> Iterator[str]:
    yield (materials / "text.jsonl").read_text()


def conclusion(place: Path, name: str) -> dict:
    return json.loads((place / "runs" / name / "reproduction.json").read_text())


def test_a_run_is_repeated_to_the_bit_and_what_is_changed_is_named(
    place: Path, text: str, dstrain: Callable[..., Said]
) -> None:
    """One run, repeated as it was, and with another seed, layout, package and corpus."""
    corpus = place / "mine.jsonl"
    corpus.write_text(text)
    said = dstrain("run", *ARGUMENTS)
    assert said.code == 0, said
    first = RunFolder(place / "runs" / "first")
    assert (first.model / "config.json").read_bytes() == (place / "model" / "config.json").read_bytes()
    [launch] = [json.loads(line) for line in first.launches.read_text().splitlines()]
    assert launch["first_step"] == 1 and len(launch["devices"]) == 2
    assert {"torch", "deepspeed", "transformers", "numpy"} <= launch["packages"].keys()

    said = dstrain("reproduce", "first")
    assert said.code == 0, said
    assert said.out.endswith("bit-equal: all 4 steps of first\n")
    assert "differs" not in said.out
    assert conclusion(place, "first-again")["differences"] == []
    again = (place / "runs" / "first-again" / "config.yaml").read_text()
    assert "lr: 0.004" in again and "# --lr" not in again, "a flag that nobody typed"

    # From another folder, and with what the run folder keeps of a model that is gone.
    (place / "elsewhere").mkdir()
    (place / "model").rename(place / "gone")
    said = dstrain("reproduce", "../runs/first", "--seed", "5", change="import os; os.chdir('elsewhere')")
    (place / "gone").rename(place / "model")
    assert said.code == 1, said
    assert "before training: validation_loss was" in said.err
    assert "seed: 1234 -> 5" in said.err

    said = dstrain("reproduce", "first", "--pipeline", "1", "--data-parallel", "2")
    assert "pipeline: 2 -> 1" in said.out
    assert conclusion(place, "first-again-3")["steps"] == 4
    # Sums in another order: seldom the same bits, and never far from them.
    assert said.code == 0 or ("relative" in said.err and "pipeline: 2 -> 1" in said.err), said

    fake = place / "elsewhere" / "numpy-0.0.1.dist-info"
    fake.mkdir(parents=True)
    (fake / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 0.0.1\n")
    change = f"import sys; sys.path.insert(0, {str(fake.parent)!r})"
    said = dstrain("reproduce", "first", "--deterministic", change=change)
    # On a CPU neither changes a bit, and both are said all the same.
    assert said.code == 0, said
    assert "differs  numpy: " in said.out and "-> 0.0.1" in said.out
    assert "differs  deterministic: False -> True" in said.out

    corpus.write_text(text.replace("fox", "box"))
    said = dstrain("reproduce", "first")
    assert said.code == 1, said
    assert "data fingerprint: " in said.err


def test_runs_without_a_record_are_refused(place: Path, dstrain_here: Callable[..., Said]) -> None:
    said = dstrain_here("reproduce", "nothing")
    assert said.code == 2
    assert "'nothing' is not a run folder" in said.err
    old = place / "runs" / "old"
    old.mkdir(parents=True)
    (old / "config.yaml").write_text("zero: 1\n")
    said = dstrain_here("reproduce", "old")
    assert said.code == 2
    assert "the run has no record of its environment" in said.err
