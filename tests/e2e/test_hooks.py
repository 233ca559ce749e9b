"""Hooks in whole runs of two ranks: the product's own, one from outside, and those that fail."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest

from dstrain.runs.run_folder import RunFolder
from tests.e2e.conftest import Said, start
from tests.e2e.test_run import left_running
from tests.support.hooks.fake_server import server
from tests.support.hooks.readers import from_metrics, from_mlflow, from_tensorboard, from_wandb

pytestmark = pytest.mark.timeout(300)

ARGUMENTS = [
    *(
        "--model",
        "model",
        "--data",
        "text.jsonl",
        "--zero",
        "2",
        "--pipeline",
        "2",
        "--steps",
        "6",
        "--seq-len",
        "32",
    ),
    *("--global-batch", "8", "--micro-batch", "2", "--set", "save_every=2", "--set", "eval_every=3"),
    *("--set", "eval_samples=4", "--set", "sample_tokens=4", "--set", "validation=0.2"),
]
FAKE_KEY = "fake1key2" * 4 + "fake"

# Not in the folder that runs are started from, but beside the config.
WATCHING = '''
import dataclasses
import json
import pathlib
import time

from dstrain.train.hooks import Hook


class Watching(Hook):
    """Writes down what it is told."""

    def __init__(self, file, awaited=()):
        self.name, self.file, self.awaited = file, None, awaited

    def on_start(self, info):
        self.file = open(f"{info.folder}/{self.name}-{info.rank}.jsonl", "a", buffering=1)
        self.write("on_start", info)

    def write(self, method, info):
        self.file.write(json.dumps([method, dataclasses.asdict(info)]) + "\\n")

    def on_step(self, info):
        self.write("on_step", info)

    def on_validation(self, info):
        self.write("on_validation", info)

    def on_save(self, info):
        self.write("on_save", info)

    def on_failure(self, info):
        self.write("on_failure", info)

    def on_end(self, info):
        self.write("on_end", info)
        # On a busy machine a run of some seconds may be over before its trackers are.
        state = pathlib.Path(self.file.name).parent / "trackers"
        for tracker in self.awaited:
            while f'"last_step": {info.step}\\n' not in read(state / f"{tracker}.json"):
                time.sleep(0.05)


def read(path):
    return path.read_text() if path.exists() else ""


class Everywhere(Watching):
    every_rank = True


class OnlySteps:
    """No base class, and one method."""

    def on_step(self, info):
        if info.step == 3:
            raise ValueError(f"the loss was {info.metrics['loss']:.1f}")
'''


class Workshop:
    def __init__(self, place: Path, environment: dict[str, str]) -> None:
        self.place, self.environment = place, environment

    def folder(self, name: str) -> RunFolder:
        return RunFolder(self.place / "runs" / name)

    def run(self, *arguments: str, **more: str) -> Said:
        with start(self.place, self.environment | more, *arguments) as process:
            return process.said()

    def config(self, **values: Any) -> str:
        """The path of a config with these values, in a folder with the module ``watching``."""
        path = self.place / "configs" / f"{len(list((self.place / 'configs').iterdir()))}.yaml"
        path.write_text(json.dumps(values))
        return str(path.relative_to(self.place))


@pytest.fixture(scope="module")
def workshop(
    tmp_path_factory: pytest.TempPathFactory, materials: Path, cache: Path, repository: Path
) -> Workshop:
    place = tmp_path_factory.mktemp("hooks-here")
    for name in ("model", "text.jsonl"):
        (place / name).symlink_to(materials / name)
    (place / "configs").mkdir()
    (place / "configs" / "watching.py").write_text(WATCHING)
    path = os.pathsep.join(filter(None, [str(repository), os.environ.get("PYTHONPATH")]))
    own = {"DSTRAIN_CACHE": str(cache), "DS_ACCELERATOR": "cpu", "COLUMNS": "200", "PYTHONPATH": path}
    elsewhere = ("WANDB_", "MLFLOW_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(elsewhere)}
    return Workshop(place, {**environment, **own})


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def calls(path: Path, method: str) -> list[dict[str, Any]]:
    return [info for name, info in lines(path) if name == method]


@pytest.fixture(scope="module")
def tracked(workshop: Workshop) -> Iterator[RunFolder]:
    """A run of 6 steps that goes on to 8 in a second launch, with all that there is beside it."""
    config = workshop.config(
        trackers=["tensorboard", {"name": "wandb", "project": "a project"}, "mlflow"],
        profile={"steps": [2, 3], "ranks": [0, 1]},
        hooks=[
            {
                "name": "watching:Watching",
                "options": {"file": "seen", "awaited": ["tensorboard", "wandb", "mlflow"]},
            },
            {"name": "watching:Everywhere", "options": {"file": "everywhere"}},
            {"name": "watching:OnlySteps", "optional": True},
        ],
    )
    folder = workshop.folder("tracked")
    said = workshop.run("run", "--config", config, *ARGUMENTS, "--name", "tracked", WANDB_MODE="offline")
    assert said.code == 0, said.out + said.err
    assert "not covered by the equality proof: hook watching:Watching, hook watching:Everywhere" in said.out
    [dropped] = [line for line in said.out.splitlines() if "OnlySteps failed" in line]
    assert "in on_step: ValueError: the loss was" in dropped and "the run continues without it" in dropped
    assert "left behind" not in said.out and not left_running(folder)
    place = workshop.place / "elsewhere"
    place.mkdir()
    for name in ("model", "text.jsonl"):
        (place / name).symlink_to(workshop.place / name)
    elsewhere = Workshop(place, workshop.environment)  # the hooks are found from anywhere
    said = elsewhere.run("resume", str(folder.path), "--steps", "8", WANDB_MODE="offline")
    assert said.code == 0, said.out + said.err
    yield folder


def test_a_hook_from_outside_is_told_everything_in_order(tracked: RunFolder) -> None:
    seen = tracked.path / "seen-0.jsonl"
    told = [(name, info.get("step", info.get("first_step"))) for name, info in lines(seen)]
    saves = [each for each in told if each[0] == "on_save"]
    assert [each for each in told if each[0] != "on_save"] == [
        ("on_start", 1), ("on_validation", 0), ("on_step", 1), ("on_step", 2), ("on_step", 3), ("on_validation", 3),
        ("on_step", 4), ("on_step", 5), ("on_step", 6), ("on_validation", 6), ("on_end", 6),
        ("on_start", 7), ("on_step", 7), ("on_step", 8), ("on_validation", 8), ("on_end", 8),
    ]  # fmt: skip
    assert saves == [("on_save", 2), ("on_save", 4), ("on_save", 6), ("on_save", 8)]
    for step in (2, 4, 6, 8):
        assert told.index(("on_save", step)) > told.index(("on_step", step))
    assert [Path(info["path"]).name for info in calls(seen, "on_save")] == [
        f"step-00000{n}" for n in (2, 4, 6, 8)
    ]
    assert not (tracked.path / "seen-1.jsonl").exists(), "rank 0 alone"


def test_a_hook_gets_the_metrics_as_the_file_has_them(tracked: RunFolder) -> None:
    seen = tracked.path / "seen-0.jsonl"
    metrics = lines(tracked.metrics)
    assert [info["metrics"] for info in calls(seen, "on_step")] == metrics[1:]
    validated = [record for record in metrics if "validation_loss" in record]
    assert calls(seen, "on_validation") == [
        {"step": r["step"], "losses": {"validation_loss": r["validation_loss"]}, "tokens": r["tokens"]}
        for r in validated
    ]
    ends = calls(seen, "on_end")
    assert [end["completed"] for end in ends] == [True, True]
    assert ends[-1]["result"] == json.loads(tracked.result.read_text())


def test_a_hook_knows_the_run(tracked: RunFolder) -> None:
    first, again = calls(tracked.path / "seen-0.jsonl", "on_start")
    assert first["run"] == "tracked" and first["folder"] == str(tracked.path)
    assert first["run_id"] == again["run_id"] == tracked.run_id.read_text().strip()
    assert first["config"]["steps"] == 6 and again["config"]["steps"] == 8
    assert first["origins"]["zero"] == "--zero" and first["origins"]["trackers"].endswith(".yaml:1")
    assert (first["rank"], first["world_size"], first["plan"]["pipeline"]) == (0, 2, 2)


def test_a_hook_for_every_rank_is_called_on_each(tracked: RunFolder) -> None:
    on_rank = [lines(tracked.path / f"everywhere-{rank}.jsonl") for rank in (0, 1)]
    assert [info["rank"] for told in on_rank for name, info in told if name == "on_start"] == [0, 0, 1, 1]
    of_zero, of_one = ([each for each in told if each[0] == "on_step"] for told in on_rank)
    without_time = [{**info["metrics"], "seconds": 0} for _, info in of_zero]
    assert without_time == [{**info["metrics"], "seconds": 0} for _, info in of_one] and len(of_one) == 8


def test_trackers_have_every_value_of_both_launches(tracked: RunFolder) -> None:
    metrics = from_metrics(tracked.metrics)
    assert sorted(metrics) == list(range(9)) and "validation_loss" in metrics[0]
    shown = {
        step: {key: float(numpy.float32(value)) for key, value in values.items()}
        for step, values in metrics.items()
    }
    assert from_tensorboard(tracked.path / "tensorboard") == shown
    values, run = from_mlflow(f"sqlite:///{tracked.path}/mlflow.db")
    assert values == metrics and run.info.status == "FINISHED" and run.data.tags["origin.zero"] == "--zero"
    histories, runs = from_wandb(tracked.path / "wandb")
    assert histories[0] | histories[1] == metrics and len(histories) == 2
    assert {(run.run_id, run.project) for run in runs} == {(tracked.run_id.read_text().strip(), "a project")}


def test_the_profiled_ranks_leave_a_trace(tracked: RunFolder) -> None:
    for rank in (0, 1):
        file = tracked.path / "profile" / f"rank-{rank}.pt.trace.json"
        trace = json.loads(file.read_text())
        names = {event.get("name", "") for event in trace["traceEvents"]}
        assert (
            any(name.startswith("aten::") for name in names) and {"ProfilerStep#2", "ProfilerStep#3"} <= names
        )
        assert f"steps 2 to 3 were profiled: {file}" in tracked.rank_log(rank).read_text()


def test_a_hook_that_raises_ends_the_run_with_its_name(workshop: Workshop) -> None:
    config = workshop.config(
        trackers=["tensorboard"],
        hooks=["watching:OnlySteps", {"name": "watching:Watching", "options": {"file": "seen"}}],
    )
    said = workshop.run("run", "--config", config, *ARGUMENTS, "--name", "raises")
    folder = workshop.folder("raises")
    assert said.code == 1
    assert "hook watching:OnlySteps failed in on_step: ValueError: the loss was" in said.err
    assert "optional: true" in said.err and not left_running(folder)
    assert 'raise ValueError(f"the loss was' in folder.rank_log(0).read_text(), "the traceback is in the log"
    [failure] = calls(folder.path / "seen-0.jsonl", "on_failure")
    assert failure["step"] == 3 and failure["error"].startswith("hook watching:OnlySteps failed")
    assert max(from_tensorboard(folder.path / "tensorboard")) == 3, "the tracker had time to write"


def test_a_hook_that_can_t_be_made_ends_the_run_before_it_begins(workshop: Workshop) -> None:
    config = workshop.config(hooks=["watching:Watching"])
    said = workshop.run("run", "--config", config, *ARGUMENTS, "--name", "unmade")
    assert said.code == 1 and "hook watching:Watching failed in __init__: TypeError" in said.err
    assert not workshop.folder("unmade").metrics.exists()


def test_servers_that_hang_end_no_run_and_no_key_is_left_anywhere(workshop: Workshop) -> None:
    folder = workshop.folder("hangs")
    arguments = ["run", *ARGUMENTS, "--name", "hangs", "--tracker", "wandb", "--tracker", "mlflow"]
    typed: set[bytes] = set()
    with server("hangs") as (address, asked):
        secrets = {"WANDB_API_KEY": FAKE_KEY, "MLFLOW_TRACKING_TOKEN": FAKE_KEY}
        places = {"WANDB_BASE_URL": address, "MLFLOW_TRACKING_URI": address}
        with start(workshop.place, workshop.environment | secrets | places, *arguments) as process:
            while process.poll() is None:
                typed |= command_lines()
                time.sleep(0.05)
            said = process.said()
    assert said.code == 0, said.out + said.err
    assert len(lines(folder.metrics)) == 7
    assert "/graphql" in asked and any("mlflow" in path for path in asked), "both have tried"
    told = [line for line in said.out.splitlines() if "tracker " in line]
    for tracker in ("wandb", "mlflow"):
        assert len([line for line in told if f"tracker {tracker} is left behind" in line]) == 1
    assert not left_running(folder) and not [line for line in command_lines() if b"wandb-core" in line]
    assert any(b"wandb-core" in line for line in typed) and not any(
        FAKE_KEY.encode() in line for line in typed
    )
    files = [path for path in workshop.place.rglob("*") if path.is_file()]
    assert not [path for path in files if FAKE_KEY.encode() in path.read_bytes()]
    assert FAKE_KEY not in said.out + said.err
    carried = folder.environment.read_text()
    assert f"WANDB_BASE_URL={address}" in carried and f"MLFLOW_TRACKING_URI={address}" in carried


def command_lines() -> set[bytes]:
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.add(path.read_bytes())
        except OSError:  # it has ended
            continue
    return found
