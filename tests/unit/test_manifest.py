"""What a complete checkpoint is."""

from __future__ import annotations

import json
from pathlib import Path

from dstrain.plan.manifest import MANIFEST, complete_checkpoints, newest_complete


def make(folder: Path, step: int, size: int = 3) -> Path:
    checkpoint = folder / f"step-{step:06d}"
    (checkpoint / "state").mkdir(parents=True)
    (checkpoint / "state" / "weights.pt").write_bytes(b"abc")
    files = {"state/weights.pt": size}
    (checkpoint / MANIFEST).write_text(json.dumps({"step": step, "files": files, "identity": {}}))
    return checkpoint


def test_newest_is_by_number_not_by_text(tmp_path: Path) -> None:
    make(tmp_path, 999_999)
    make(tmp_path, 1_000_000)
    assert newest_complete(tmp_path) == tmp_path / "step-1000000"


def test_a_file_that_is_missing_or_cut_off_makes_it_incomplete(tmp_path: Path) -> None:
    whole, cut, missing, half = (
        make(tmp_path, 1),
        make(tmp_path, 2, size=4),
        make(tmp_path, 3),
        make(tmp_path, 4),
    )
    (missing / "state" / "weights.pt").unlink()
    (half / MANIFEST).write_text('{"step": 4, "fil')
    (tmp_path / ".step-000005.partial").mkdir()
    (tmp_path / "step-next").mkdir()
    assert complete_checkpoints(tmp_path) == [whole]
    assert cut.is_dir()


def test_a_file_that_somebody_left_beside_the_others_does_no_harm(tmp_path: Path) -> None:
    checkpoint = make(tmp_path, 1)
    (checkpoint / "state" / "note.txt").write_text("best so far")
    assert newest_complete(tmp_path) == checkpoint
