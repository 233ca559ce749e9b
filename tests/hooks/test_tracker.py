"""What every tracker is given by its base: a training that waits for nothing, and does not fail for it."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dstrain.hooks import trackers
from dstrain.hooks.trackers import Record, State, Tracker, numbers_in, without_secrets
from dstrain.train.hooks import EndInfo, FailureInfo, StartInfo, StepInfo, ValidationInfo


@pytest.fixture
def start(tmp_path: Path) -> StartInfo:
    return StartInfo("run", str(tmp_path), "0" * 16, {}, {}, {}, 1, 0, 1)


class Library(Tracker):
    """Keeps what it gets. ``fails``: how often each of its calls fails; ``gate``: what `write` waits for."""

    name = "library"

    def __init__(self, fails: dict[str, int] | None = None, gate: threading.Event | None = None) -> None:
        self.fails, self.gate = fails or {}, gate
        self.got: list[dict[str, Any]] = []
        self.calls: list[str] = []
        self.writing = threading.Event()
        self.lines: list[str] = []
        self.say = self.lines.append
        super().__init__()

    def _called(self, name: str) -> None:
        self.calls.append(name)
        if self.fails.get(name, 0) > 0:
            self.fails[name] -= 1
            raise ConnectionError(f"{name} of http://me:hunter22@host does not work\nsecond line")

    def load(self) -> None:
        self._called("load")

    def open(self, info: StartInfo) -> None:
        self._called("open")

    def write(self, records: Sequence[Record]) -> None:
        self.writing.set()
        if self.gate is not None:
            self.gate.wait()
        self._called("write")
        self.got += [record for _, record in records]

    def close(self, state: State) -> None:
        self._called(f"close {state}")

    def abandon(self) -> None:
        self.calls.append("abandon")


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "SECONDS_BETWEEN_WRITES", 0.001)
    monkeypatch.setattr(trackers, "_FIRST_PAUSE", 0.001)


def step(number: int) -> StepInfo:
    return StepInfo(number, {"step": number, "loss": 1.0 / number})


def test_every_record_arrives_once_and_in_order(start: StartInfo) -> None:
    library = Library()
    library.on_start(start)
    library.on_validation(ValidationInfo(0, {"validation": 5.0}, tokens=0))
    for number in range(1, 300):
        library.on_step(step(number))
    library.on_validation(
        ValidationInfo(299, {"validation": 4.0}, tokens=9)
    )  # stands in the step's own record
    library.on_end(EndInfo(299, True, {}))
    library.wait(60)
    assert library.got == [
        {"step": 0, "validation": 5.0, "tokens": 0},
        *({"step": number, "loss": 1.0 / number} for number in range(1, 300)),
    ]
    assert library.calls[:2] == ["load", "open"] and library.calls[-1] == "close finished"
    assert not library.lines


@pytest.mark.parametrize("what", ["load", "open", "write", "close finished"])
def test_what_fails_is_tried_again_and_said_once(what: str, start: StartInfo) -> None:
    library = Library(fails={what: 0 if what.startswith("close") else 3})
    library.on_start(start)
    for number in range(1, 20):
        library.on_step(step(number))
    while library.fails.get(what):
        library.writing.wait(0.001)
    if what.startswith("close"):
        library.fails[what] = 1
    library.on_end(EndInfo(19, True, {}))
    library.wait(60)
    assert [record["step"] for record in library.got] == list(range(1, 20))
    [line] = library.lines
    assert "ConnectionError" in line and "the run continues" in line and "second line" not in line
    assert "hunter22" not in line


def test_what_never_works_ends_with_the_run(start: StartInfo) -> None:
    library = Library(fails={"open": 10**9})
    library.on_start(start)
    for number in range(1, 20):
        library.on_step(step(number))
    library.on_failure(FailureInfo(19, "why"))
    library.wait(60)
    assert not library.got and library.calls[-1] == "abandon"
    failed, left = library.lines
    assert "failed" in failed and "19 steps are not written" in left


def test_a_library_that_hangs_holds_nothing_up(start: StartInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "LIMIT", 100)
    never = threading.Event()
    library = Library(gate=never)
    library.on_start(start)
    library.on_step(step(1))
    assert library.writing.wait(60), "it hangs now"
    for number in range(2, 1002):
        library.on_step(step(number))  # each returns, though nobody takes anything out of the queue
    assert [record["step"] for _, record in library._queue] == list(range(902, 1002)), "the newest are kept"
    library.on_end(EndInfo(1001, True, {}))
    library.wait(0.01)
    slow, left = library.lines
    assert "oldest are dropped" in slow and "101 steps are not written" in left
    assert library.calls[-1] == "abandon"
    never.set()


@pytest.mark.parametrize(("written", "missed"), [(4, [5, 6, 7]), (9, []), (None, [0, 1, 2, 3, 4, 5, 6, 7])])
def test_what_an_earlier_launch_had_no_time_for_is_written_first(
    written: int | None, missed: list[int], start: StartInfo, tmp_path: Path
) -> None:
    records = [{"step": number, "loss": 1.0} for number in range(10)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if written is not None:
        (tmp_path / "trackers").mkdir()
        (tmp_path / "trackers" / "library.json").write_text(json.dumps({"last_step": written}))
    library = Library()
    library.on_start(replace(start, first_step=8))
    library.on_step(step(8))
    library.on_end(EndInfo(8, True, {}))
    library.wait(60)
    assert [record["step"] for record in library.got] == [*missed, 8]
    assert json.loads((tmp_path / "trackers" / "library.json").read_text()) == {"last_step": 8}


def test_a_run_that_fails_before_its_start_waits_for_nothing() -> None:
    library = Library()
    library.on_failure(FailureInfo(0, "why"))
    library.wait(60)
    library._thread.join(60)
    assert not library._thread.is_alive() and not library.lines and "open" not in library.calls


def test_a_step_that_was_skipped_has_no_norm() -> None:
    record = {"step": 3, "loss": 2.5, "grad_norm": None, "skipped": True, "tokens": 7}
    assert numbers_in(record) == {"loss": 2.5, "skipped": 1, "tokens": 7}


def test_no_secret_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "0123456789abcdef-more")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter22")
    text = without_secrets(
        "0123456789abcdef, 0123456789abcdef-more, hunter22 at https://user:pw@host/path?a@b"
    )
    assert text == "***, ***, *** at https://***@host/path?a@b"
