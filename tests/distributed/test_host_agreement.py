"""Whether ranks find out that their hosts have different plans, or folders of their own at the same place."""

from __future__ import annotations

import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.distributed.workers import run

HOSTS = ["n1", "n1", "n2"]


def agree(rank: int, folders: list[str], choices: dict[str, Any]) -> str | None:
    """What this rank refuses. Each has the folder of its host."""
    from dstrain.errors import DstrainError
    from dstrain.runs.run_folder import RunFolder
    from dstrain.train import local_run_folder
    from dstrain.train.host_agreement import check_hosts_agree

    local_run_folder.LATE_SECONDS = 0.3
    socket.gethostname = lambda: HOSTS[rank]
    plan: Any = SimpleNamespace(
        layout=SimpleNamespace(hosts=("n1", "n2")),
        run_config=SimpleNamespace(**{"init": "random", **choices}),
        model=SimpleNamespace(weights_folder=folders[rank]),
    )
    try:
        check_hosts_agree(RunFolder(folders[rank]), plan)
    except DstrainError as error:
        return str(error)
    return None


def folders(place: Path, *, shared: bool, plans: tuple[str, str] = ("a plan", "a plan")) -> list[str]:
    """Each rank's, n1's and n2's; a word of an earlier start lies in both."""
    found = [place / "n1", place / ("n1" if shared else "n2")]
    for folder, plan in zip(found, plans, strict=True):
        folder.mkdir(exist_ok=True)
        (folder / "plan.json").write_text(plan)
        (folder / ".shared").write_text("a word of an earlier start\n")
    return [str(found[0]), str(found[0]), str(found[1])]


@pytest.mark.parametrize(
    ("shared", "saves", "save_weights", "words"),
    [
        (True, True, True, None),
        (False, True, False, ("all ranks write checkpoints", "--save-every never")),
        (False, False, True, ("all stages write the final weights", "--set save_weights=false")),
        (False, False, False, None),
    ],
)
def test_a_folder_is_shared_where_it_must_be(
    shared: bool, saves: bool, save_weights: bool, words: tuple[str, str] | None, tmp_path: Path
) -> None:
    places = folders(tmp_path, shared=shared)
    said = run(3, agree, places, {"saves": saves, "save_weights": save_weights})
    if words is None:
        assert said == [None] * 3
        return
    for place, text in zip(places, said, strict=True):  # on all ranks
        assert (
            text is not None and f"n2 does not share the run folder of n1 ({place}), and {words[0]}" in text
        )
        assert "--set runs_dir=FOLDER" in text and words[1] in text


def test_a_checkpoint_to_go_on_from_is_shared_even_if_no_other_is_made(tmp_path: Path) -> None:
    places = folders(tmp_path, shared=False)
    (tmp_path / "n1" / "checkpoints" / "step-000002").mkdir(parents=True)
    said = run(3, agree, places, {"saves": False, "save_weights": False})
    assert all(text is not None and "all ranks read the checkpoint to resume from" in text for text in said)


@pytest.mark.parametrize("there", [None, b"shorter"])
def test_other_weights_to_start_from_are_refused(there: bytes | None, tmp_path: Path) -> None:
    places = folders(tmp_path, shared=False)
    choices = {"saves": False, "save_weights": False, "init": "pretrained"}
    for name in ("n1", "n2"):
        (tmp_path / name / "model-1.safetensors").write_bytes(b"the same")
        (tmp_path / name / "model-2.safetensors").write_bytes(b"of some length")
    assert run(3, agree, places, choices) == [None] * 3
    (tmp_path / "n2" / "model-2.safetensors").unlink()
    if there is not None:
        (tmp_path / "n2" / "model-2.safetensors").write_bytes(there)
    for place, text in zip(places, run(3, agree, places, choices), strict=True):
        assert text is not None and text.startswith(f"{place}: the model's weight files on n2 are missing or")
        assert "differ from those on n1: model-2.safetensors\n" in text


def test_another_plan_is_refused(tmp_path: Path) -> None:
    places = folders(tmp_path, shared=False, plans=("a plan", "another plan"))
    said = run(3, agree, places, {"saves": False, "save_weights": False})
    assert said[0] is not None and "n2 has a different plan than n1 (rank 2)" in said[0]
