"""A disk that takes no more ends a run with one error, and the run goes on from what it had once there is room."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from dstrain.errors import DstrainError
from dstrain.runs.protocol import RankStatus
from dstrain.runs.run_folder import RunFolder
from dstrain.train.metrics import MetricsFile
from tests.support.torture.runs import Layout, Run, assert_ends_as_unbroken

LAYOUT = Layout(zero=3, pipeline=1, data_parallel=2)
# Less than a rank's optimizer states (168 kB), more than its log and its metrics.
LARGEST_FILE = 100_000


@pytest.mark.heavy
def test_files_that_may_not_grow(place: Path, unbroken: Callable[[Layout], Run]) -> None:
    run = Run(place, "limited", LAYOUT)
    run.fail(
        rank=1,
        largest_file=LARGEST_FILE,
        signs=["rank 1", "the checkpoint of step 5 could not be written: ", "no checkpoint was made yet"],
    )
    assert run.newest() == 0
    run.stop_after(7)
    run.fail(
        rank=0,
        largest_file=LARGEST_FILE,
        signs=[
            "rank 0",
            "could not be written: ",
            f"step-{run.newest():06d} is complete and can be resumed from",
        ],
    )
    assert not list(run.folder.checkpoints.glob(".step-*")), "what was written of it is gone"
    assert_ends_as_unbroken(run, unbroken)


def test_a_small_disk(place: Path, unbroken: Callable[[Layout], Run]) -> None:
    """Room for two checkpoints of 376 kB each, where three are needed while an old one is replaced."""
    run = Run(place, "small-disk", LAYOUT)
    run.folder.checkpoints.mkdir(parents=True)
    with small_disk(run.folder.checkpoints, "1m"):
        run.fail(
            signs=[
                "the checkpoint of step 15 could not be written: No space left on device",
                "step-000010 is complete and can be resumed from",
            ]
        )
        assert run.newest() == 10
        subprocess.run(["mount", "-o", "remount,size=4m", str(run.folder.checkpoints)], check=True)
        assert_ends_as_unbroken(run, unbroken)


def test_a_disk_that_somebody_else_fills(place: Path, unbroken: Callable[[Layout], Run]) -> None:
    """The whole run folder lies on it: no metrics, log or last word can be written either."""
    run = Run(place, "filled-disk", LAYOUT)
    run.folder.path.mkdir(parents=True)
    with small_disk(run.folder.path, "4m"):
        with run.attempt() as attempt:
            assert attempt.wait_until(lambda: "named" in attempt.new_marks()), run.told(attempt)
            fill(run.folder.path / "ballast")
            assert attempt.wait() == 1, run.told(attempt)
            attempt.wait_until_all_have_ended()
            run.check_one_clear_error(attempt)
            assert "No space left on device" in run.told(attempt).split("error: ")[1]
        (run.folder.path / "ballast").unlink()
        assert_ends_as_unbroken(run, unbroken)


def test_words_on_a_full_disk(tmp_path: Path) -> None:
    """A rank's last word takes the place of the one before, and metrics that don't fit are an error for the user."""
    with small_disk(tmp_path, "256k"):
        folder = RunFolder(tmp_path)
        folder.make("umask")
        metrics = MetricsFile(folder.metrics, after_step=0)
        running = RankStatus(rank=0, host="here", pid=1, state="running")
        folder.write_status(running)
        fill(tmp_path / "ballast")
        folder.write_status(replace(running, state="failed", error="No space left on device, not a byte"))
        told = folder.read_status(0)
        assert told is not None
        assert (told.state, told.error) == ("failed", "No space left on device, not a byte")
        assert not list(folder.logs.glob("*.tmp"))
        folder.write_status(replace(running, state="done"))
        assert folder.read_status(0) == replace(running, state="done", time=folder.read_status(0).time)
        with pytest.raises(DstrainError, match="metrics could not be written: No space left on device"):
            for step in range(1000):
                metrics.write({"step": step, "loss": 1.0})
        (tmp_path / "ballast").unlink()
        metrics.close()


def fill(ballast: Path) -> None:
    """Write until there is no room for a byte."""
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"a small disk can't be mounted here: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
