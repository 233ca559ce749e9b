"""A run folder that 0.1 made can be resumed, in its layout and in another, exported, repeated and checked.

It is unpacked in a folder that has another name than the one it was made in, and spaces in it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.golden.commands import PLACE_NAME, Said
from tests.golden.make_run_folder import ANSWERS, ARCHIVE, NAME, weights_of
from tests.golden.processor import tolerance
from tests.golden.runs import losses_of, number_differences

OTHER_LAYOUT = 1e-5
"""Largest relative difference between layouts in fp32."""


@pytest.fixture
def answers() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(ANSWERS.read_text(encoding="utf-8"))
    return loaded


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """The folder that the run was started from, as someone has it who was sent it."""
    place = tmp_path / PLACE_NAME
    shutil.unpack_archive(ARCHIVE, place)
    return place


@pytest.fixture
def folder(place: Path) -> Path:
    return place / "runs" / NAME


def test_it_goes_on(folder: Path, answers: dict[str, Any], dstrain: Callable[..., Said]) -> None:
    trained = losses_of(folder)
    assert number_differences(answers["losses"][:3], trained, 0.0) == [], "the archive itself"
    said = dstrain("resume", NAME, "--steps", "4")
    assert said.code == 0, said
    now = losses_of(folder)
    assert number_differences(trained, now[:3], 0.0) == [], "what it had trained stays as it was"
    assert number_differences(answers["losses"], now, tolerance(answers["made_on"])) == []
    assert (folder / "checkpoints" / "step-000004" / "manifest.json").is_file()

    # The model of the step that 0.1 saved, from the folder as it is now.
    said = dstrain("export", NAME, "out", "--step", "2", "--no-loss")
    assert said.code == 0, said
    assert weights_of(folder.parents[1] / "out") == answers["weights"]


def test_it_goes_on_in_another_layout(
    folder: Path, answers: dict[str, Any], dstrain: Callable[..., Said]
) -> None:
    said = dstrain("resume", NAME, "--steps", "4", "--zero", "1", "--pipeline", "1")
    assert said.code == 0, said
    assert number_differences(answers["losses"], losses_of(folder), OTHER_LAYOUT) == []
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    assert len(plan["layout"]["ranks"]) == 2, "two stages have become one, with the same replicas"


def test_it_is_exported(
    place: Path, folder: Path, answers: dict[str, Any], dstrain: Callable[..., Said]
) -> None:
    """Every tensor to the bit: nothing is computed. The run folder was moved here; what it needs it has."""
    said = dstrain("export", NAME, "out", "--no-loss")
    assert said.code == 0, said
    assert weights_of(place / "out") == answers["weights"]
    config = json.loads((place / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LlamaForCausalLM"] and config["num_hidden_layers"] == 4


def test_it_is_repeated(
    place: Path, folder: Path, answers: dict[str, Any], dstrain: Callable[..., Said]
) -> None:
    said = dstrain("reproduce", NAME)
    again = place / "runs" / f"{NAME}-again"
    allowed = tolerance(answers["made_on"])
    assert number_differences(losses_of(folder), losses_of(again), allowed) == [], said
    found = json.loads((again / "reproduction.json").read_text(encoding="utf-8"))
    assert (found["of"], found["steps"], found["last_steps"]) == (NAME, 2, [2, 2])
    assert found["equal"] or allowed > 0, said
    assert said.code == (0 if found["equal"] else 1), said


def test_its_checkpoint_is_complete(folder: Path, dstrain: Callable[..., Said]) -> None:
    said = dstrain("checkpoints", NAME, "--verify", "--json")
    assert said.code == 0, said
    shown = json.loads(said.out)
    assert shown["run"] == NAME and shown["verified"] is True
    [checkpoint] = shown["checkpoints"]
    assert checkpoint["state"] == "complete" and checkpoint["step"] == 2
    assert checkpoint["layout"] == "zero2-pp2-dp2" and checkpoint["checksums"] is True

    # Another byte is found, and the exit code says so.
    damaged = next(folder.glob("checkpoints/*/state/*optim_states.pt"))
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    said = dstrain("checkpoints", NAME, "--verify", "--json")
    assert said.code == 1, said
    assert [found["state"] for found in json.loads(said.out)["checkpoints"]] == ["damaged"]
