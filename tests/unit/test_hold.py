"""A checkpoint that somebody reads stays while a training goes on."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import Any

import pytest

from dstrain.api import exporting
from dstrain.api.checkpoint_list import checkpoints
from dstrain.api.events import Events
from dstrain.errors import DstrainError
from dstrain.files import write_json
from dstrain.runs.checkpoint.hold import held, unless_held
from dstrain.runs.checkpoint.manifest import FileRecord, checksum, complete_checkpoints, make_manifest
from dstrain.train.checkpointing.checkpoint_folder import prune


def save(folder: Path, step: int) -> Path:
    checkpoint = folder / f"step-{step:06d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights").write_text(str(step))
    files = {"weights": FileRecord(len(str(step)), checksum(checkpoint / "weights"))}
    manifest = make_manifest(
        step=step, run="0" * 16, identity={}, config={}, versions={}, saved_at=0.0, files=files
    )
    write_json(checkpoint / "manifest.json", manifest)
    return checkpoint


def keep_newest(folder: Path) -> list[str]:
    prune(folder, keep=1, keep_every=0, damaged=())
    return [path.name for path in sorted(folder.iterdir())]


def no_locks(*_: object) -> None:
    raise OSError(95, "Operation not supported")


class Heard(Events):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str, topic: str = "note") -> None:
        self.notes.append(f"{topic}: {text}")


def test_it_is_removed_when_nobody_reads_it_any_more(tmp_path: Path) -> None:
    old, between, _ = (save(tmp_path, step) for step in (1, 2, 3))
    with held(old), held(old), held(between):
        assert keep_newest(tmp_path) == ["step-000001", "step-000002", "step-000003"]
    with held(between):
        assert keep_newest(tmp_path) == ["step-000002", "step-000003"]
    assert keep_newest(tmp_path) == ["step-000003"]


def test_one_that_goes_can_not_be_held(tmp_path: Path) -> None:
    old = save(tmp_path, 1)
    with unless_held(old) as free:
        assert free
        old.rename(tmp_path / ".step-000001.removed")
        with pytest.raises(FileNotFoundError), held(old):
            pass


def test_where_files_can_not_be_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", no_locks)
    old, _ = save(tmp_path, 1), save(tmp_path, 2)
    with held(old):
        assert keep_newest(tmp_path) == ["step-000002"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    return tmp_path / "run"


def train_on(run: Path, step: int) -> None:
    """Another step is saved, and only the newest is kept."""
    save(run / "checkpoints", step)
    keep_newest(run / "checkpoints")


def test_an_export_reads_what_it_began_to_read(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(run / "checkpoints", 1)

    def convert(module: str, request: dict[str, Any], events: Events) -> dict[str, Any]:
        train_on(run, 2)
        return {"step": int((Path(request["checkpoint"]) / "weights").read_text()), **REST}

    monkeypatch.setattr(exporting, "_ask", convert)
    assert exporting.export(run, run / "out").step == 1
    train_on(run, 3)
    assert [path.name for path in complete_checkpoints(run / "checkpoints")] == ["step-000003"]


@pytest.mark.parametrize("step", [None, 1])
def test_an_export_whose_checkpoint_goes_takes_the_next_or_says_so(
    run: Path, step: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", no_locks)
    save(run / "checkpoints", 1)
    asked = []

    def convert(module: str, request: dict[str, Any], events: Events) -> dict[str, Any]:
        asked.append(Path(request["checkpoint"]).name)
        if len(asked) == 1:
            train_on(run, 2)
            raise DstrainError("dstrain.exporting.convert failed: FileNotFoundError", exit_code=1)
        return {"step": 2, **REST}

    monkeypatch.setattr(exporting, "_ask", convert)
    heard = Heard()
    if step is None:
        assert exporting.export(run, run / "out", events=heard).step == 2
        assert asked == ["step-000001", "step-000002"]
        assert heard.notes == ["export: step-000001 was removed by the training meanwhile"]
    else:
        with pytest.raises(DstrainError, match="has no checkpoint of step 1") as caught:
            exporting.export(run, run / "out", step=step, events=heard)
        assert "available steps: 2" in (caught.value.hint or "")


def test_another_error_of_an_export_is_not_tried_again(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(run / "checkpoints", 1)

    def convert(*_: object) -> dict[str, Any]:
        raise DstrainError("the disk is full")

    monkeypatch.setattr(exporting, "_ask", convert)
    with pytest.raises(DstrainError, match="the disk is full"):
        exporting.export(run, run / "out")


def test_an_export_that_is_told_to_end_leaves_nothing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(run / "checkpoints", 1)

    def convert(module: str, request: dict[str, Any], events: Events) -> dict[str, Any]:
        Path(request["aside"]).mkdir()
        raise SystemExit(143)

    monkeypatch.setattr(exporting, "_ask", convert)
    before = sorted(run.iterdir())
    with pytest.raises(SystemExit):
        exporting.export(run, run / "out")
    assert sorted(run.iterdir()) == before


def test_a_checkpoint_is_verified_although_the_training_goes_on(run: Path) -> None:
    """None that was removed meanwhile is called damaged."""
    save(run / "checkpoints", 1)
    began = []

    def read(path: Path, count: int, total: int) -> None:
        if not began:
            began.append(path)
            train_on(run, 2)

    found = checkpoints(run, verify=True, on_bytes=read)
    assert [(info.step, info.state) for info in found] == [(1, "complete")]
    assert began and (run / "checkpoints" / "step-000001").exists()


REST: dict[str, Any] = {
    "dtype": "fp32", "files": 1, "tensors": 1, "parameters": 1, "bytes": 1, "loss": None,
    "no_loss_because": None, "run_loss": None, "run_loss_step": None,
}  # fmt: skip
