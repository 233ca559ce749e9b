"""The real libraries, without a server: what goes in comes out again, and a second launch goes on with the same run."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest

from dstrain.hooks.mlflow_tracker import MlflowTracker
from dstrain.hooks.tensorboard_tracker import TensorBoardTracker
from dstrain.hooks.trackers import Tracker, numbers_in
from dstrain.hooks.wandb_tracker import WandbTracker
from dstrain.train.hooks import EndInfo, StartInfo, StepInfo, ValidationInfo
from tests.support.hooks.readers import from_mlflow, from_tensorboard, from_wandb

RUN_ID = "0123456789abcdef"
CONFIG = {"lr": 3e-4, "steps": 8, "data": "stdlib", "trackers": [{"name": "wandb"}]}
ORIGINS = {"lr": "my.yaml:3", "steps": "--steps", "data": "default", "trackers": "default"}

RESUMED = dict.fromkeys(ORIGINS, "config.yaml:1") | {"steps": "--steps"}


def record(step: int) -> dict[str, Any]:
    return {
        "step": step, "loss": 5.0 / step, "lr": 3e-4 / step, "grad_norm": None if step == 2 else 1.0 / 3,
        "seconds": 0.25, "tokens": step * 2**40, "memory": 80_000_000_001, "skipped": step == 2,
    }  # fmt: skip


def launch(
    make: Callable[[], Tracker],
    folder: Path,
    first: int,
    last: int,
    *,
    completed: bool,
    until: Callable[[], bool] = lambda: True,
    patience: float = 60,
    origins: dict[str, str] = ORIGINS,
    **config: Any,
) -> list[str]:
    """One launch of a run, which ends once ``until`` is so; the lines that it told the user."""
    tracker, lines = make(), []
    tracker.say = lines.append
    tracker.on_start(
        StartInfo("a run", str(folder), RUN_ID, CONFIG | config, origins, {"world_size": 2}, first, 0, 2)
    )
    if first == 1:
        tracker.on_validation(ValidationInfo(0, {"validation": 5.5}, tokens=0))
    for step in range(first, last + 1):
        tracker.on_step(StepInfo(step, record(step)))
    while not until():
        time.sleep(0.01)
    tracker.on_end(EndInfo(last, completed, {}))
    tracker.wait(patience)
    return lines


def expected(steps: range) -> dict[int, dict[str, float]]:
    return {0: {"validation": 5.5, "tokens": 0}} | {step: numbers_in(record(step)) for step in steps}


def test_tensorboard_shows_each_step_once(tmp_path: Path) -> None:
    assert not launch(TensorBoardTracker, tmp_path, 1, 6, completed=False)
    assert not launch(TensorBoardTracker, tmp_path, 5, 8, completed=True)  # from the checkpoint of step 4
    found = from_tensorboard(tmp_path / "tensorboard")
    as_float32 = {
        step: {key: float(numpy.float32(value)) for key, value in values.items()}
        for step, values in expected(range(1, 9)).items()
    }
    assert found == as_float32
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2, "a file for each launch, and no more"


def test_tensorboard_shows_the_config_with_its_origins(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    launch(TensorBoardTracker, tmp_path, 1, 2, completed=True)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    [event] = events.Tensors("config/text_summary")
    assert "| lr | `0.0003` | my.yaml:3 |" in event.tensor_proto.string_val[0].decode()


def test_mlflow_goes_on_with_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "a folder"
    folder.mkdir()
    uri = f"sqlite:///{folder}/mlflow.db"
    assert not launch(MlflowTracker, folder, 1, 6, completed=False)
    _, run = from_mlflow(uri)
    assert run.info.status == "KILLED", "it left before its end"
    assert not launch(MlflowTracker, folder, 5, 8, completed=True, origins=RESUMED, steps=9)
    values, run = from_mlflow(uri)
    assert values == expected(range(1, 9))
    assert run.info.run_name == "a run" and run.info.status == "FINISHED"
    told = {key: run.data.params[key] for key in (*CONFIG, "plan.world_size")}
    assert told == {key: str(value) for key, value in (CONFIG | {"plan.world_size": 2}).items()}
    tags = {key: value for key, value in run.data.tags.items() if key.startswith(("origin.", "resumed."))}
    assert tags == {"origin.lr": "my.yaml:3", "origin.steps": "--steps", "resumed.steps": "9"}
    assert os.listdir(tmp_path) == ["a folder"], "nothing is left beside the run folder"


def test_wandb_offline_keeps_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "a folder"
    folder.mkdir()
    make = lambda: WandbTracker(project="a project", group="g", tags=["t"])  # noqa: E731
    assert not launch(make, folder, 1, 6, completed=False)
    assert not launch(make, folder, 7, 8, completed=True, origins=RESUMED, steps=9)
    histories, runs = from_wandb(folder / "wandb")
    assert histories[0] | histories[1] == expected(range(1, 9)) and len(histories) == 2
    assert min(histories[1]) == 7
    for run in runs:
        assert (run.run_id, run.project, run.run_group, list(run.tags)) == (RUN_ID, "a project", "g", ["t"])
        assert run.display_name == "a run"
    said = {item.key: json.loads(item.value_json) for run in runs for item in run.config.update}
    assert (said["lr"], said["steps"], said["origin.lr"]) == (0.0003, 9, "my.yaml:3")
    assert os.listdir(tmp_path) == ["a folder"], "nothing is left beside the run folder"


def test_wandb_without_a_key_is_offline_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    [line] = launch(WandbTracker, tmp_path, 1, 4, completed=True)
    assert "is offline" in line and "API key" in line and f"wandb sync {tmp_path}/wandb/offline-run-" in line
    histories, _ = from_wandb(tmp_path / "wandb")
    assert histories[-1] == expected(range(1, 5))
