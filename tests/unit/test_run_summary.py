"""The end of a run in words."""

from __future__ import annotations

from pathlib import Path

from dstrain.api.run_summary import error_of
from dstrain.errors import RESUMABLE
from dstrain.runs.run_folder import RunFolder
from dstrain.supervise.outcome import Cause, Outcome

STOPPED = Outcome(False, RESUMABLE, None, stopped_after=3)


def test_a_run_that_left_in_order_can_be_resumed(tmp_path: Path) -> None:
    error = error_of(STOPPED, RunFolder(tmp_path), saves=True)
    assert error.exit_code == RESUMABLE
    assert "stopped after step 3, which is saved" in str(error) and "goes on from there" in str(error)


def test_without_checkpoints_there_is_nothing_to_go_on_from(tmp_path: Path) -> None:
    error = error_of(STOPPED, RunFolder(tmp_path), saves=False)
    assert error.exit_code == 1, "whoever starts it again on 75 would do so for ever"
    assert "nothing is saved (save_every: never)" in str(error) and "begins anew" in str(error)


def test_a_log_on_another_hosts_disk_is_looked_for_there(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    outcome = Outcome(False, 1, Cause(3, "n2", "ValueError: no", ["Traceback ...", "its last line"]))
    text = str(error_of(outcome, folder, saves=True))
    assert f"The end of {folder.rank_log(3)} (on n2):\n  | Traceback ...\n  | its last line\n" in text
    folder.logs.mkdir()
    folder.rank_log(3).touch()
    assert f"The end of {folder.rank_log(3)}:\n" in str(error_of(outcome, folder, saves=True))
