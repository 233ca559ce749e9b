"""The end of a run: a result, or the one cause of its failure."""

from __future__ import annotations

from pathlib import Path

import pytest

from dstrain.api.outcome import RunFailedError, RunResult, result_of
from dstrain.cli.run import leave
from dstrain.errors import RESUMABLE, DstrainError
from dstrain.runs.run_folder import RunFolder
from dstrain.supervise.failure_cause import Cause, Outcome

STOPPED = Outcome(False, RESUMABLE, None, stopped_after=3)


def shown(result: RunResult) -> DstrainError:
    with pytest.raises(DstrainError) as caught:
        leave(result)
    return caught.value


def test_a_run_that_left_in_order_can_be_resumed(tmp_path: Path) -> None:
    result = result_of(STOPPED, RunFolder(tmp_path), saves=True)
    assert (result.step, result.completed, result.saved) == (3, False, True)
    error = shown(result)
    assert error.exit_code == result.exit_code == RESUMABLE
    assert "stopped after step 3, which is saved" in str(error) and "continues from there" in str(error)


def test_without_checkpoints_there_is_nothing_to_go_on_from(tmp_path: Path) -> None:
    error = shown(result_of(STOPPED, RunFolder(tmp_path), saves=False))
    assert error.exit_code == 1, "whoever starts it again on 75 would do so for ever"
    assert "nothing is saved (save_every: never)" in str(error) and "starts again from step 0" in str(error)


def test_a_log_on_another_hosts_disk_is_looked_for_there(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    outcome = Outcome(False, 1, Cause(3, "n2", "ValueError: no", ["Traceback ...", "its last line"]))
    with pytest.raises(RunFailedError) as caught:
        result_of(outcome, folder, saves=True)
    text = str(caught.value)
    assert f"Last lines of {folder.rank_log(3)} (on n2):\n  | Traceback ...\n  | its last line\n" in text
    assert (caught.value.rank, caught.value.host, caught.value.reason) == (3, "n2", "ValueError: no")
    folder.logs.mkdir()
    folder.rank_log(3).touch()
    with pytest.raises(RunFailedError) as caught:
        result_of(outcome, folder, saves=True)
    assert f"Last lines of {folder.rank_log(3)}:\n" in str(caught.value)


def test_a_run_that_completed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.result.write_text('{"steps": 4, "held_out_loss": 2.5, "prompt": "a", "continuation": null}')
    result = result_of(Outcome(True, 0, None), folder, saves=True)
    assert result == RunResult(tmp_path, 4, True, True, None, 2.5), "the file is one of 0.1"
    assert result.exit_code == 0
    leave(result)
