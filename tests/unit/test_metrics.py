"""metrics.jsonl over resumes, and the live line that follows it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dstrain.api.events import Events, Step
from dstrain.api.following import RunFollower
from dstrain.runs.run_folder import RunFolder
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

    def validated(self, step: int, loss: float) -> None:
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
