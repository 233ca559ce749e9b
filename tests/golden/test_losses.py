"""A small model trained in three layouts has the losses of 0.1, and a run folder the same files and keys.

Two runs of one layout are equal to the bit here, with new interpreters and with forks, with 1, 2 and 4 threads. Other
processors have other kernels, which add in another order: with those of AVX2 and of plain SSE forced upon the machine
that made the numbers, the furthest of them was 2e-7 off. So the numbers are compared to the bit where the processor
and the libraries are the recorded ones, else to 1e-6 (`processor`).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.golden.commands import Said, make_place, start
from tests.golden.compare import NEW_FILES, key_differences
from tests.golden.processor import same_numbers, tolerance
from tests.golden.runs import (
    IN_DETAIL,
    LAYOUTS,
    LOSSES,
    RUN_FOLDER,
    losses_of,
    number_differences,
    run_folder_of,
    train,
)


class Trained:
    """Runs of this test session, each trained when it is first asked for."""

    def __init__(self, place: Path, environ: dict[str, str]) -> None:
        self._place, self._environ = place, environ
        self._folders: dict[str, Path] = {}

    def folder(self, layout: str) -> Path:
        if layout not in self._folders:
            self._folders[layout] = train(layout, self._place, self._dstrain)
        return self._folders[layout]

    def _dstrain(self, *arguments: str) -> Said:
        return start(self._place, self._environ, *arguments).said()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, environ: dict[str, str]) -> Trained:
    return Trained(make_place(tmp_path_factory.mktemp("losses")), environ)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_losses_are_the_same(layout: str, trained: Trained) -> None:
    stored = json.loads(LOSSES.read_text(encoding="utf-8"))
    now = losses_of(trained.folder(layout))
    assert number_differences(stored["losses"][layout], now, tolerance(stored["made_on"])) == []


@pytest.mark.heavy
@pytest.mark.parametrize("layout", LAYOUTS)
def test_new_interpreters_with_the_default_threads_have_the_same_losses(
    layout: str, place: Path, environ: dict[str, str]
) -> None:
    stored = json.loads(LOSSES.read_text(encoding="utf-8"))
    folder = train(layout, place, lambda *arguments: start(place, environ, *arguments, real=True).said())
    assert number_differences(stored["losses"][layout], losses_of(folder), tolerance(stored["made_on"])) == []


def test_a_run_folder_has_the_same_files(trained: Trained) -> None:
    stored = json.loads(RUN_FOLDER.read_text(encoding="utf-8"))
    now = run_folder_of(trained.folder(IN_DETAIL))
    assert sorted(set(stored["files"]) - set(now["files"])) == [], "gone"
    assert sorted(set(now["files"]) - set(stored["files"]) - NEW_FILES) == [], "new"


@pytest.mark.parametrize("file", ["metrics.jsonl", "launches.jsonl", "manifest.json"])
def test_each_record_has_the_same_keys(file: str, trained: Trained) -> None:
    stored = json.loads(RUN_FOLDER.read_text(encoding="utf-8"))[file]
    now = run_folder_of(trained.folder(IN_DETAIL))[file]
    assert len(stored) == len(now)
    found = [key_differences(old, new) for old, new in zip(stored, now, strict=True)]
    assert not any(found), found


@pytest.mark.parametrize("file", ["result.json", "record.json", "status.json"])
def test_each_file_has_the_same_keys(file: str, trained: Trained) -> None:
    stored = json.loads(RUN_FOLDER.read_text(encoding="utf-8"))[file]
    assert key_differences(stored, run_folder_of(trained.folder(IN_DETAIL))[file]) == []


def test_numbers_are_compared_to_the_bit() -> None:
    """On the recorded machine a float's last bit counts; elsewhere the seventh digit does."""
    assert same_numbers(5.5, 5.5, 0.0)
    assert not same_numbers(5.5, 5.500000000000001, 0.0)
    assert same_numbers(5.5, 5.500001, 1e-6) and not same_numbers(5.5, 5.50001, 1e-6)
    assert not same_numbers(1, 1.0, 1e-6)
