"""`--restarts` with a failure that comes again each time: the run is given up instead of tried for ever."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dstrain.runs.checkpoint.manifest import complete_checkpoints
from dstrain.runs.run_folder import RunFolder, read_metrics
from tests.support.e2e import Said

pytestmark = pytest.mark.timeout(400)

ARGUMENTS = [
    *("--model", "model", "--data", "text.jsonl", "--seq-len", "32", "--global-batch", "4"),
    *("--set", "validation=0", "--set", "sample_tokens=0", "--set", "lr_schedule=constant"),
    *("--set", "warmup_steps=0", "--restarts", "5", "--name", "again"),
]


# Nothing but the wait before a restart is made shorter.
SOON = "import dstrain.api.restart_policy as restarts\nrestarts._FIRST_SECONDS = 0.1"


def test_the_same_step_twice_is_enough(place: Path, dstrain: Callable[..., Said]) -> None:
    """The first step throws the weights so far away that the second one's loss is no number."""
    said = dstrain("run", *ARGUMENTS, "--steps", "6", "--save-every", "1", "--lr", "1e30", change=SOON)
    assert said.code == 1, said
    assert said.out.count("restart ") == 2, said.out
    assert "restart 1 of 5 in 0 s" in said.out
    assert "restart no: it failed again after step 1, and no checkpoint was made in between" in said.out
    assert "at step 2" in said.err
    folder = RunFolder(place / "runs" / "again")
    assert [record["step"] for record in read_metrics(folder.metrics)] == [1]
    assert [path.name for path in complete_checkpoints(folder.checkpoints)] == ["step-000001"]


@pytest.mark.heavy  # three launches
def test_checkpoints_that_are_all_damaged_are_not_tried_for_ever(
    place: Path, dstrain: Callable[..., Said]
) -> None:
    said = dstrain("run", *ARGUMENTS, "--steps", "4", "--save-every", "2", "--set", "keep=2", change=SOON)
    assert said.code == 0, said
    folder = RunFolder(place / "runs" / "again")
    for checkpoint in complete_checkpoints(folder.checkpoints):
        largest = max(checkpoint.rglob("*"), key=lambda path: path.stat().st_size)
        content = bytearray(largest.read_bytes())
        content[len(content) // 2] ^= 0xFF
        largest.write_bytes(content)
    said = dstrain("resume", "again", "--steps", "6", change=SOON)
    assert said.code == 1, said
    assert "restart 1 of 5 in 0 s" in said.out
    assert "restart no: it failed again before the first step" in said.out
    assert "no checkpoint of this run is usable" in said.err
    assert [record["step"] for record in read_metrics(folder.metrics)] == [1, 2, 3, 4]
