"""metrics.jsonl over resumes, and the live line that follows it."""

from __future__ import annotations

import errno
import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest

from dstrain.api.events import Events, Step
from dstrain.api.following import RunFollower
from dstrain.runs.run_folder import RunFolder, last_validation_losses
from dstrain.train.metrics import MetricsFile


def record(step: int, seconds: float = 0.1) -> dict[str, object]:
    return {
        "step": step,
        "loss": 5 - step / 10,
        "lr": 0.1,
        "grad_norm": 1.0,
        "tokens": step,
        "seconds": seconds,
    }


def write(folder: RunFolder, first: int, last: int, *, after_step: int, seconds: float = 0.1) -> None:
    file = MetricsFile(folder.metrics, after_step=after_step)
    if after_step == 0:
        file.write({"step": 0, "validation_loss": 5.5, "tokens": 0})
    for step in range(first, last + 1):
        file.write(record(step, seconds))
    file.close()


def steps(folder: RunFolder) -> list[int]:
    return [json.loads(line)["step"] for line in folder.metrics.read_text().splitlines()]


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


@pytest.mark.parametrize("died_at", [0, 1, 7])
@pytest.mark.parametrize("checkpoint", [0, 5])
def test_no_step_stands_twice(folder: RunFolder, died_at: int, checkpoint: int) -> None:
    """Also where the run died before its first checkpoint: step 0 is evaluated again."""
    write(folder, 1, max(died_at, checkpoint), after_step=0)
    write(folder, checkpoint + 1, 9, after_step=checkpoint)
    assert steps(folder) == list(range(10))


def test_half_a_line_is_no_line(folder: RunFolder) -> None:
    write(folder, 1, 6, after_step=0)
    with folder.metrics.open("a") as file:
        file.write('{"step": 7, "lo')
    write(folder, 6, 8, after_step=5)
    assert steps(folder) == list(range(9))


class Screen(Events):
    """What an observer is told of the steps since it was asked last."""

    def __init__(self, folder: RunFolder) -> None:
        self.steps: list[int] = []
        self.follower = RunFollower(folder, self)

    def step(self, step: Step) -> None:
        self.steps.append(step.step)

    def validated(self, step: int, loss: float, losses: Mapping[str, float]) -> None:
        if step == 0:
            self.steps.append(step)

    def shown(self) -> list[int]:
        self.follower.update()
        told, self.steps = self.steps, []
        return told


def test_an_observer_follows_the_file(folder: RunFolder) -> None:
    screen = Screen(folder)
    assert screen.shown() == []
    write(folder, 1, 3, after_step=0)
    assert screen.shown() == [0, 1, 2, 3]
    with folder.metrics.open("a") as file:
        file.write(json.dumps(record(4)) + "\n" + json.dumps(record(5))[:20])
        file.flush()
        assert screen.shown() == [4]
        file.write(json.dumps(record(5))[20:] + "\n")
    assert screen.shown() == [5]
    assert screen.shown() == []


@pytest.mark.parametrize("last", [6, 7, 9, 20])
def test_a_resumed_run_shows_what_it_repeats(folder: RunFolder, last: int) -> None:
    """The file may have grown beyond its old length before it is looked at for the first time."""
    write(folder, 1, 9, after_step=0, seconds=0.123456)
    screen = Screen(folder)
    write(folder, 6, last, after_step=5)
    assert screen.shown() == list(range(6, last + 1))


def test_a_follower_of_the_file_sees_a_resume_that_drops_nothing(folder: RunFolder) -> None:
    write(folder, 1, 4, after_step=0)
    with folder.metrics.open() as follower:
        follower.seek(0, 2)
        write(folder, 5, 6, after_step=4)
        assert [json.loads(line)["step"] for line in follower] == [5, 6]
    assert steps(folder) == list(range(7))


@pytest.mark.parametrize(
    "line",
    ['{"step": 4, "held_out_loss": 5.0}\n', '{"step": 4, "validation_loss": NaN}\n', "\xff\n", "[]\n"],
    ids=["of 0.1", "no JSON", "no UTF-8", "no record"],
)
def test_lines_that_are_written_otherwise_now(folder: RunFolder, line: str) -> None:
    write(folder, 1, 3, after_step=0)
    with folder.metrics.open("ab") as file:
        file.write(line.encode("latin-1"))
    write(folder, 5, 5, after_step=4)
    read = [json.loads(text, parse_constant=lambda _: pytest.fail()) for text in folder.metrics.open()]
    assert [record["step"] for record in read if record["step"] != 4] == [0, 1, 2, 3, 5]
    assert not any("held_out_loss" in record for record in read)


def test_a_loss_that_is_no_number_is_null_in_the_file_and_nan_to_its_readers(folder: RunFolder) -> None:
    seen: list[float] = []

    class Observer(Events):
        def validated(self, step: int, loss: float, losses: Mapping[str, float]) -> None:
            seen.append(loss)

        def step(self, step: Step) -> None:
            seen.append(step.loss)
            assert step.grad_norm is None

    follower = RunFollower(folder, Observer())
    file = MetricsFile(folder.metrics, after_step=0)
    file.write({"step": 0, "validation_loss": math.nan, "tokens": 0})
    file.write(record(1) | {"loss": math.inf, "grad_norm": None})
    file.close()
    assert "NaN" not in folder.metrics.read_text() and "Infinity" not in folder.metrics.read_text()
    follower.update()
    assert len(seen) == 2 and all(math.isnan(loss) for loss in seen)
    assert math.isnan(last_validation_losses(folder.metrics)["validation_loss"])


def test_a_disk_that_does_not_answer_ends_no_run(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is shown comes later."""
    screen = Screen(folder)
    write(folder, 1, 2, after_step=0)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.ESTALE, "stale")))
        assert screen.shown() == []
    assert screen.shown() == [0, 1, 2]
