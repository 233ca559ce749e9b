"""Whole runs through DeepSpeed's launcher on CPU: five launches serve all tests.

The first one starts real interpreters all along; the others are forks of one that has imported everything.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest

from dstrain.config.loader import read_config
from dstrain.errors import RESUMABLE
from dstrain.planning.plan import Plan
from dstrain.runs.checkpoint.manifest import complete_checkpoints
from dstrain.runs.run_folder import RunFolder
from tests.support.e2e import CommandLine, Said, start

pytestmark = pytest.mark.timeout(300)

STEPS, SAVE_EVERY, EVAL_EVERY = 60, 5, 20
ARGUMENTS = [
    *("--model", "model", "--data", "text.jsonl", "--zero", "2", "--pipeline", "2", "--steps", str(STEPS)),
    *("--seq-len", "32", "--global-batch", "8", "--micro-batch", "2", "--set", f"save_every={SAVE_EVERY}"),
    *("--set", f"eval_every={EVAL_EVERY}", "--set", "eval_samples=4", "--set", "sample_tokens=8"),
    *("--set", "prompt=007 the", "--set", "validation=0.2"),
]
# What must be the same in a run that was killed and resumed; seconds and memory may differ.
SAME = ("step", "loss", "lr", "grad_norm", "tokens", "validation_loss")


def records(folder: RunFolder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in folder.metrics.read_text().splitlines()]


def left_running(folder: RunFolder) -> list[str]:
    """Command lines of living processes that name the run folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if str(folder.path) in line and state != "Z" and int(entry.name) != os.getpid():
            found.append(line)
    return found


class Workshop:
    """The folder in which this file's runs lie, and what the undisturbed run said."""

    def __init__(self, place: Path, environment: dict[str, str]) -> None:
        self.place, self.environment = place, environment
        self.calm = self.folder("calm")

    def folder(self, name: str) -> RunFolder:
        return RunFolder(self.place / "runs" / name)

    def start(self, *arguments: str) -> CommandLine:
        return start(self.place, self.environment, *arguments)

    def run(self, *arguments: str) -> Said:
        with self.start(*arguments) as process:
            return process.said()

    def run_for_real(self, *arguments: str) -> Said:
        """With a new interpreter wherever one is started."""
        done = subprocess.run(
            [sys.executable, "-m", "dstrain.cli.main", *arguments],
            cwd=self.place,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=250,
            check=False,
        )
        return Said(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def workshop(
    tmp_path_factory: pytest.TempPathFactory, materials: Path, cache: Path, repository: Path
) -> Workshop:
    place = tmp_path_factory.mktemp("runs-here")
    for name in ("model", "text.jsonl"):
        (place / name).symlink_to(materials / name)
    path = os.pathsep.join(filter(None, [str(repository), os.environ.get("PYTHONPATH")]))
    own = {"DSTRAIN_CACHE": str(cache), "DS_ACCELERATOR": "cpu", "COLUMNS": "200", "PYTHONPATH": path}
    return Workshop(place, {**os.environ, **own})


@pytest.fixture(scope="module")
def calm(workshop: Workshop) -> Iterator[Said]:
    said = workshop.run_for_real("run", *ARGUMENTS, "--name", "calm")
    assert said.code == 0, said.out + said.err
    yield said


def test_a_run_leaves_all_that_it_promises(workshop: Workshop, calm: Said) -> None:
    folder = workshop.calm
    assert not calm.err
    for path in (folder.config, folder.plan, folder.deepspeed_config, folder.launch_script, folder.metrics):
        assert path.stat().st_size > 0
    plan = Plan.from_record(json.loads(folder.plan.read_text()))
    assert (plan.layout.pipeline, plan.layout.world_size) == (2, 2)
    assert json.loads(folder.deepspeed_config.read_text()) == plan.deepspeed
    assert read_config(folder.config).config == plan.run_config
    for rank in range(plan.layout.world_size):
        assert folder.rank_log(rank).exists()
        status = folder.read_status(rank)
        assert status is not None and (status.state, status.step) == ("done", STEPS)
    kept = [path.name for path in complete_checkpoints(folder.checkpoints)]
    assert kept == [f"step-{STEPS - SAVE_EVERY:06d}", f"step-{STEPS:06d}"]
    assert not left_running(folder)


def test_metrics_hold_one_record_a_step(workshop: Workshop, calm: Said) -> None:
    first, *steps = records(workshop.calm)
    assert first["step"] == 0 and first["validation_loss"] > 4  # about log 260, before training
    assert [record["step"] for record in steps] == list(range(1, STEPS + 1))
    for record in steps:
        assert {"step", "loss", "lr", "grad_norm", "tokens", "seconds", "memory"} <= set(record)
        assert record["tokens"] == record["step"] * 8 * 32
        assert record["seconds"] > 0 and record["memory"] > 2**20 and record["grad_norm"] > 0
        assert ("validation_loss" in record) == (record["step"] % EVAL_EVERY == 0)
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.5, "it learns"


def test_the_end_says_what_came_out(workshop: Workshop, calm: Said) -> None:
    result = json.loads(workshop.calm.result.read_text())
    assert result["steps"] == STEPS
    assert result["validation_loss"] == records(workshop.calm)[-1]["validation_loss"]
    assert result["continuation"].startswith("007 the") and len(result["continuation"]) > len("007 the")
    assert f"validation loss  {result['validation_loss']:.4f}" in calm.out
    assert str(workshop.calm.path) in calm.out and f"step-{STEPS:06d}" in calm.out
    assert f"step {STEPS}/{STEPS}" in calm.out


def test_the_plan_can_be_held_against_the_run(workshop: Workshop, calm: Said) -> None:
    assert any(line.startswith("measured") and " per step" in line for line in calm.out.splitlines())
    said = workshop.run("plan", "--of", "calm", "--json")
    assert said.code == 0, said.err
    rows = {row["what"]: row for row in json.loads(said.out)["rows"]}
    assert rows["a step"]["measured"] > 0 and rows["a step"]["difference"] is not None
    assert rows["memory of the fullest rank"]["measured"] > rows["memory of the fullest rank"]["estimated"]
    assert abs(rows["traffic between stages"]["difference"]) < 0.05


def test_launch_sh_is_the_command_that_was_shown(workshop: Workshop, calm: Said) -> None:
    shown = next(line for line in calm.out.splitlines() if line.startswith("command"))
    script = workshop.calm.launch_script.read_text().splitlines()
    command = shlex.split(next(line for line in script if line.startswith("exec ")))[1:]
    assert command == shlex.split(shown)[1:]
    assert command[-3:] == ["--module", "dstrain.train.worker", str(workshop.calm.path)]
    assert command[command.index("--num_gpus") + 1] == "2"


def test_a_killed_rank_is_named_and_the_run_resumes_exactly(workshop: Workshop, calm: Said) -> None:
    folder = workshop.folder("killed")
    with workshop.start("run", *ARGUMENTS, "--name", "killed") as process:
        while not complete_checkpoints(folder.checkpoints):
            assert process.poll() is None, process.err
            time.sleep(0.005)  # between two looks
        status = folder.read_status(1)
        assert status is not None
        os.kill(status.pid, signal.SIGKILL)
        code, _, err = astuple(process.said(120))
    assert code != 0, "a run that was killed has not succeeded"
    last = err.strip().splitlines()[-2:]
    assert last[0].startswith("rank 1 on ") and "SIGKILL" in last[0], err
    assert last[1].strip().startswith("hint: `dstrain resume ")
    assert "Traceback" not in err.split("The end of")[0]
    assert not folder.result.exists()
    assert not left_running(folder)
    assert records(folder)[-1]["step"] < STEPS, "the kill came too late to test anything"

    before = complete_checkpoints(folder.checkpoints)[-1].name
    said = workshop.run("resume", "killed")
    assert said.code == 0, said.out + said.err
    assert f"continues from {before}" in said.out
    assert_as_undisturbed(workshop, folder)


def assert_as_undisturbed(workshop: Workshop, folder: RunFolder) -> None:
    """Each step once, and with the numbers of the run that nobody disturbed, to the bit."""
    undisturbed, resumed = records(workshop.calm), records(folder)
    assert [record["step"] for record in resumed] == list(range(STEPS + 1))
    for one, other in zip(undisturbed, resumed, strict=True):
        assert {key: one.get(key) for key in SAME} == {key: other.get(key) for key in SAME}
    assert json.loads(folder.result.read_text()) == json.loads(workshop.calm.result.read_text())
    assert not left_running(folder)


def test_a_run_that_is_told_to_stop_leaves_in_order_and_resumes_exactly(
    workshop: Workshop, calm: Said
) -> None:
    folder = workshop.folder("stopped")
    with workshop.start("run", *ARGUMENTS, "--name", "stopped") as process:
        while not folder.metrics.exists() or not any(r["step"] > 2 for r in records(folder)[:-1]):
            assert process.poll() is None, process.err
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        code, _, err = astuple(process.said(120))
    assert code == RESUMABLE, err
    [last] = records(folder)[-1:]
    assert f"stopped after step {last['step']}, which is saved" in err and "Traceback" not in err
    assert 3 <= last["step"] < STEPS, "the stop came too late to test anything"
    assert complete_checkpoints(folder.checkpoints)[-1].name == f"step-{last['step']:06d}"
    assert not folder.result.exists() and not folder.stop_request.exists()
    assert not left_running(folder)

    said = workshop.run("resume", "stopped")
    assert said.code == 0, said.out + said.err
    assert_as_undisturbed(workshop, folder)


def test_a_finished_run_is_not_run_again(workshop: Workshop, calm: Said) -> None:
    before = workshop.calm.result.read_text(), workshop.calm.metrics.read_text()
    said = workshop.run("resume", "calm")
    assert said.code == 0 and "finished" in said.out and "--steps" in said.out
    assert (workshop.calm.result.read_text(), workshop.calm.metrics.read_text()) == before


def test_resume_refuses_another_training(workshop: Workshop, calm: Said) -> None:
    said = workshop.run("resume", "calm", "--steps", str(STEPS + 1), "--seed", "5")
    assert said.code == 2
    assert "but this run has 5" in said.err and "hint: resume with the same seed" in said.err


@pytest.mark.parametrize("command", ["run", "resume"])
def test_dry_run_starts_nothing(
    command: str, workshop: Workshop, calm: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = workshop.calm.launch_script.read_text()
    if command == "run":
        said = workshop.run("run", *ARGUMENTS, "--name", "dry", "--dry-run")
    else:
        said = workshop.run("resume", "calm", "--steps", str(STEPS + 1), "--dry-run")
    assert said.code == 0 and "dstrain.train.worker" in said.out and not said.err
    assert not workshop.folder("dry").path.exists()
    assert workshop.calm.launch_script.read_text() == launch
    assert len(records(workshop.calm)) == STEPS + 1
