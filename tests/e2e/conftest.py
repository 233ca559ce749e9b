"""A folder to stand in, and the command line there, in this process or in one of its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.arguments import layered
from tests.support.e2e import Child, Said, start


@pytest.fixture
def place(
    tmp_path: Path, materials: Path, cache: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """An empty folder to stand in, with a CPU machine's environment; ``model`` and ``text.jsonl`` are there."""
    for name in ("model", "text.jsonl"):
        (tmp_path / name).symlink_to(materials / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DSTRAIN_CACHE", str(cache))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("COLUMNS", "200")
    path = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(repository), path])))
    yield tmp_path


@pytest.fixture
def dstrain_here(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Said]:
    """Run the command line in this process: ``dstrain_here("plan", "--zero", "2")``.

    What it runs in processes of their own is forked.
    """
    monkeypatch.setattr("dstrain.child_process.ChildProcess", Child)

    def call(*arguments: str) -> Said:
        from dstrain.cli.main import main

        monkeypatch.setattr(sys, "argv", ["dstrain", *layered(arguments)])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        captured = capsys.readouterr()
        return Said(code, captured.out, captured.err)

    return call


@pytest.fixture
def dstrain(place: Path) -> Callable[..., Said]:
    """Run the command line in a process of its own."""

    def call(*arguments: str, timeout: float = 200, change: str = "") -> Said:
        return start(place, os.environ, *arguments, change=change).said(timeout)

    return call
