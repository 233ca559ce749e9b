"""Run folders of commands that are started at the same time."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dstrain.api.preflight import claim, make_numbered, new_run_folder
from dstrain.config.loader import load_config
from dstrain.errors import DstrainError


def test_runs_without_a_name_never_share_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "strftime", lambda _: "2027-01-01-000000")
    resolved = load_config(flags={"runs_dir": str(tmp_path / "runs"), "model": "tiny"})
    folders = [new_run_folder(resolved, resume=False) for _ in range(20)]
    assert not (tmp_path / "runs").exists(), "nothing is made before a run starts"
    with ThreadPoolExecutor(8) as pool:
        names = list(pool.map(lambda folder: claim(folder, resolved).name, folders))
    first = "2027-01-01-000000-tiny"
    assert sorted(names) == sorted([first, *(f"{first}-{number}" for number in range(2, 21))])
    assert {path.name for path in (tmp_path / "runs").iterdir()} == set(names)


def test_of_two_runs_of_one_name_one_is_refused(tmp_path: Path) -> None:
    resolved = load_config(flags={"runs_dir": str(tmp_path / "runs"), "name": "mine"})
    first, second = (new_run_folder(resolved, resume=False) for _ in range(2))
    claim(first, resolved)
    with pytest.raises(DstrainError, match=r"runs/mine already exists") as caught:
        claim(second, resolved)
    assert caught.value.where == "--name" and "dstrain resume mine" in (caught.value.hint or "")


def test_a_folder_that_can_not_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    resolved = load_config(flags={"runs_dir": str(tmp_path / "runs")})
    folder = new_run_folder(resolved, resume=False)
    (tmp_path / "runs").symlink_to(tmp_path / "file")
    with pytest.raises(DstrainError, match="can't be written"):
        claim(folder, resolved)


def test_tables_of_verify(tmp_path: Path) -> None:
    assert [make_numbered(tmp_path / "verify", "private").name for _ in range(3)] == [
        "verify",
        "verify-2",
        "verify-3",
    ]


def test_a_current_folder_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(
        DstrainError, match=r"runs can't be created: the current folder has been removed"
    ) as caught:
        new_run_folder(load_config(), resume=False)
    assert caught.value.hint


def test_a_name_that_no_folder_can_have(tmp_path: Path) -> None:
    with pytest.raises(DstrainError, match=r"n+\.\.\. can't be created: File name too long"):
        new_run_folder(load_config(flags={"runs_dir": str(tmp_path / ("n" * 500))}), resume=False)
