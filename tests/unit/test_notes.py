"""What rank 0 says for the user is found among the launcher's lines."""

from __future__ import annotations

from pathlib import Path

from dstrain.api.events import Events
from dstrain.api.following import NotesTail, RunFollower
from dstrain.runs.run_folder import NOTE, RunFolder


def test_notes_of_this_launch_alone_whole_and_without_what_stands_before(tmp_path: Path) -> None:
    log = tmp_path / "launcher.log"
    log.write_text(f"{NOTE}of an earlier launch\n")
    notes = NotesTail(log)
    with log.open("a") as file:
        file.write(f"[INFO] launch\n{NOTE}one\nnode1: {NOTE}two: 2\n{NOTE}thr")
        file.flush()
        assert notes.new() == ["one", "two: 2"]
        assert notes.new() == []
        file.write("ee\n")
    assert notes.new() == ["three"]


def test_a_log_that_is_not_there_yet(tmp_path: Path) -> None:
    notes = NotesTail(tmp_path / "launcher.log")
    assert notes.new() == []
    (tmp_path / "launcher.log").write_text(f"{NOTE}one\n")
    assert notes.new() == ["one"]


class Heard(Events):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str, topic: str = "note") -> None:
        self.notes.append(f"{topic}: {text}")


def test_an_observer_is_told(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.logs.mkdir()
    heard = Heard()
    follower = RunFollower(folder, heard)
    folder.launcher_log.write_text(f"{NOTE}step-000006 is not used: it has no manifest, and so on\n")
    follower.update()
    follower.update()
    assert heard.notes == ["note: step-000006 is not used: it has no manifest, and so on"]
