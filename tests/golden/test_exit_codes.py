"""Exit codes: 0 it went well, 1 it failed, 2 refused, 75 stopped in order and to be resumed, 130 interrupted."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.golden.commands import Process, Said
from tests.golden.runs import LAYOUTS, metrics_of

OK, FAILED, REFUSED, RESUMABLE, INTERRUPTED = 0, 1, 2, 75, 130
RUN = "run --config train.yaml"


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        (OK, "--help"),
        (OK, "--version"),
        (OK, "plan --help"),
        (OK, "plan --config train.yaml --data-parallel 2"),
        (OK, "plan --config train.yaml --explain zero"),
        (OK, "run --config train.yaml --data-parallel 2 --dry-run"),
        (OK, "config check train.yaml"),
        (OK, "config schema"),
        (REFUSED, "plna"),
        (REFUSED, "plan --no-such-flag"),
        (REFUSED, "plan --zero 4"),
        (REFUSED, "plan --zero two"),
        (REFUSED, "plan --config gone.yaml"),
        (REFUSED, "plan --config train.yaml --set stepz=3"),
        (REFUSED, "plan --config train.yaml --data gone.jsonl"),
        (REFUSED, "plan --config train.yaml --model gone-model"),
        (REFUSED, "plan --config train.yaml --pipeline 50"),
        (REFUSED, "plan --config train.yaml --schedule dualpipev --pipeline 1"),
        (REFUSED, "plan --config train.yaml --device no-such-device --nodes 1"),
        (REFUSED, "run --config train.yaml --data-parallel 3"),
        (REFUSED, "run --config train.yaml --partition 1,2 --pipeline 2"),
        (REFUSED, "resume gone"),
        (REFUSED, "reproduce gone"),
        (REFUSED, "export gone out"),
        (REFUSED, "checkpoints gone"),
        (REFUSED, "config check hosts"),
    ],
)
def test_what_starts_nothing(code: int, arguments: str, place: Path, dstrain: Callable[..., Said]) -> None:
    said = dstrain(*arguments.split())
    assert said.code == code, said
    assert bool(said.err.strip()) == (code != OK) and "Traceback" not in said.err + said.out
    assert not (place / "runs").exists()


def test_a_run_whose_loss_is_no_number(place: Path, dstrain: Callable[..., Said]) -> None:
    said = dstrain(*f"{RUN} {LAYOUTS['one-process']} --lr 1e30 --name bad".split())
    assert said.code == FAILED, said
    assert not (place / "runs" / "bad" / "result.json").exists()


def test_a_run_whose_time_is_over(place: Path, dstrain: Callable[..., Said]) -> None:
    said = dstrain(*f"{RUN} {LAYOUTS['one-process']} --steps 1000000 --time-limit 1s --name timed".split())
    assert said.code == RESUMABLE, said
    assert list((place / "runs" / "timed" / "checkpoints").glob("step-*/manifest.json")), "it has saved"


def test_a_run_that_is_told_to_stop(place: Path, started: Callable[..., Process]) -> None:
    layout = LAYOUTS["zero-2-pipeline-2"]
    process = started(*f"{RUN} {layout} --steps 1000000 --save-every 0 --name told".split())
    folder = place / "runs" / "told"
    _wait(process, lambda: (folder / "metrics.jsonl").exists() and len(_steps(folder)) > 2)
    os.kill(process.pid, signal.SIGTERM)
    said = process.said()
    assert said.code == RESUMABLE, said
    last = _steps(folder)[-1]
    assert (folder / "checkpoints" / f"step-{last:06d}" / "manifest.json").is_file()


def test_a_plan_that_is_interrupted(place: Path, tmp_path: Path, started: Callable[..., Process]) -> None:
    """While it waits for a process that measures: its cache is empty. With a new interpreter: at a fork, Python
    swallows what is raised in the hooks of its libraries."""
    plan = ("plan", "--config", "train.yaml")
    process = started(*plan, real=True, DSTRAIN_CACHE=str(tmp_path / "empty cache"))
    _wait(process, lambda: _has_started_another(process.pid))
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    said = process.said()
    assert said.code == INTERRUPTED, said
    assert not said.out


def _has_started_another(pid: int) -> bool:
    """Whether a child of the process runs a program of its own by now."""
    try:
        own = psutil.Process(pid)
        return any(child.cmdline() not in ([], own.cmdline()) for child in own.children())
    except psutil.NoSuchProcess:
        return False


def _steps(folder: Path) -> list[int]:
    """Of whole lines: another may be written right now."""
    return [line["step"] for line in metrics_of(folder)]


def _wait(process: Process, is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not is_so():
        assert process.poll() is None, process.said()
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.01)  # between two looks
