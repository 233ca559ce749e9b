"""What rank 0 says for the user is found among the launcher's lines."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from dstrain.report.live import LiveLine
from dstrain.report.notes import Notes
from dstrain.runs.run_folder import NOTE, RunFolder


def test_notes_of_this_launch_alone_whole_and_without_what_stands_before(tmp_path: Path) -> None:
    log = tmp_path / "launcher.log"
    log.write_text(f"{NOTE}of an earlier launch\n")
    notes = Notes(log)
    with log.open("a") as file:
        file.write(f"[INFO] launch\n{NOTE}one\nnode1: {NOTE}two: 2\n{NOTE}thr")
        file.flush()
        assert notes.new() == ["one", "two: 2"]
        assert notes.new() == []
        file.write("ee\n")
    assert notes.new() == ["three"]


def test_a_log_that_is_not_there_yet(tmp_path: Path) -> None:
    notes = Notes(tmp_path / "launcher.log")
    assert notes.new() == []
    (tmp_path / "launcher.log").write_text(f"{NOTE}one\n")
    assert notes.new() == ["one"]


def test_the_live_line_shows_them(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.logs.mkdir()
    said = io.StringIO()
    with LiveLine(folder, Console(file=said, width=40), steps=3):
        folder.launcher_log.write_text(f"{NOTE}step-000006 is not used: it has no manifest, and so on\n")
    assert "note   step-000006 is not used: it has no manifest, and so on\n" in said.getvalue()
