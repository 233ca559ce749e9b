"""Who may read what a real run makes, and a run whose folder goes away while it trains."""

from __future__ import annotations

import os
import shutil
import stat
import time
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from dstrain.runs.received import refuse_links
from dstrain.runs.run_folder import FILES, FOLDERS, RunFolder
from tests.e2e.test_run import left_running
from tests.support.e2e import start

pytestmark = pytest.mark.timeout(300)

ARGUMENTS = [
    *("run", "--model", "model", "--data", "text.jsonl", "--zero", "1", "--pipeline", "2", "--seq-len", "32"),
    *("--global-batch", "8", "--micro-batch", "2", "--set", "save_every=2", "--set", "sample_tokens=0"),
    *("--set", "profile={steps: [1, 2]}", "--tracker", "tensorboard", "--name", "kept"),
]
# Whoever else may read the rest: the values of the user's variables.
PRIVATE = ("kept/environment", "kept/.environment")
TRAINS_ON = ("--steps", "100000")


def modes(folder: RunFolder) -> dict[str, int]:
    return {
        path.relative_to(folder.path.parent).as_posix(): stat.S_IMODE(path.lstat().st_mode)
        for path in (folder.path, *folder.path.rglob("*"))
    }


def check(folder: RunFolder, of_folder: int, of_file: int) -> None:
    """Every file and folder, as far as it is not being renamed; what may be run is open to the same people."""
    found = modes(folder)
    assert {found.pop(name) for name in PRIVATE if name in found} <= {0o600}
    wrong = {
        name: oct(mode)
        for name, mode in found.items()
        if mode & 0o666 != ((of_folder if (folder.path.parent / name).is_dir() else of_file) & 0o666)
        or mode & 0o077 & ~of_folder
    }
    assert not wrong


def check_names(folder: RunFolder) -> None:
    """A name that a run makes is one that is looked at before the folder is used again."""
    unknown = [
        path.name
        for path in folder.path.iterdir()
        if path.name not in FOLDERS and not any(fnmatchcase(path.name, pattern) for pattern in FILES)
    ]
    assert not unknown
    refuse_links(folder)


def test_a_group_may_read(place: Path) -> None:
    folder = RunFolder(place / "runs" / "kept")
    arguments = [*ARGUMENTS, "--steps", "4", "--access", "group", "--set", "save_weights=true"]
    with start(place, os.environ, *arguments, change="import os; os.umask(0o077)") as run:
        said = run.said()
    assert said.code == 0, said
    check(folder, 0o750, 0o640)
    check_names(folder)
    assert (folder.weights / "stage-0.safetensors").is_file()


@pytest.mark.parametrize(("mask", "way"), [(0o022, "deleted"), (0o000, "moved")])
def test_a_private_run_whose_folder_goes_away(mask: int, way: str, place: Path) -> None:
    folder = RunFolder(place / "runs" / "kept")
    with start(place, os.environ, *ARGUMENTS, *TRAINS_ON, change=f"import os; os.umask({mask})") as run:
        deadline = time.monotonic() + 200
        while not (folder.checkpoints / "step-000004" / "manifest.json").exists():
            assert time.monotonic() < deadline and run.poll() is None, run.out
            time.sleep(0.05)
        assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
        folder.path.rename(place / "elsewhere")
        if way == "deleted":
            shutil.rmtree(place / "elsewhere", ignore_errors=True)
        began = time.monotonic()
        said = run.said(60)
        took = time.monotonic() - began
    assert said.code == 1, said
    assert "its folder was deleted, moved or replaced while it trained" in said.err
    assert (
        sum(line.startswith("error:") for line in said.err.splitlines()) == 1 and "Traceback" not in said.err
    )
    assert "run folder " not in said.out and "saved" not in said.out
    assert took < 30, "no test measures speed, but this one waits for no step and no checkpoint"
    assert not left_running(folder) and not folder.path.exists()
    if way == "moved":
        moved = RunFolder(place / "elsewhere")
        check(moved, 0o700, 0o600)
        check_names(moved)
