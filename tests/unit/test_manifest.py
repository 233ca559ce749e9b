"""What a complete checkpoint is, whose it is, and which one a run goes on from."""

from __future__ import annotations

import io
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dstrain.api.checkpoint_list import checkpoints
from dstrain.errors import DstrainError
from dstrain.runs.checkpoint.manifest import (
    MANIFEST,
    FileRecord,
    checksum,
    choose_newest,
    complete_checkpoints,
    damage_of,
    digest,
    file_sizes,
    files_of,
    forget_damage,
    half_written,
    keep_run_id,
    make_manifest,
    newest_complete,
    note_damage,
    read_manifest,
    run_id,
    share_out,
    unknown_files,
    wrong_files,
)

RUN = "0123456789abcdef"
CONTENT = {"state/weights.pt": b"abc", "state/optimizer.pt": b"defgh", "script.py": b""}


def make(folder: Path, step: int, *, run: str = RUN, content: dict[str, bytes] = CONTENT) -> Path:
    checkpoint = folder / f"step-{step:06d}"
    (checkpoint / "state").mkdir(parents=True)
    for name, data in content.items():
        (checkpoint / name).write_bytes(data)
    manifest = make_manifest(
        step=step,
        run=run,
        identity={"zero": 1, "eps": 1e-8, "freeze": []},
        config={"lr": 3e-4},
        versions={"dstrain": "0.1.0"},
        saved_at=1.5,
        files={name: FileRecord(len(data), checksum(checkpoint / name)) for name, data in content.items()},
    )
    (checkpoint / MANIFEST).write_text(json.dumps(manifest, indent=2))
    return checkpoint


def make_earlier(folder: Path, step: int, size: int = 3) -> Path:
    """As they were before there were checksums."""
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


@pytest.mark.parametrize("maker", [make, make_earlier])
def test_a_file_that_is_missing_or_cut_off_makes_it_incomplete(maker: Any, tmp_path: Path) -> None:
    whole, cut, missing, half = (maker(tmp_path, step) for step in (1, 2, 3, 4))
    (cut / "state" / "weights.pt").write_bytes(b"ab")
    (missing / "state" / "weights.pt").unlink()
    (half / MANIFEST).write_text('{"step": 4, "fil')
    (tmp_path / ".step-000005.partial").mkdir()
    (tmp_path / "step-next").mkdir()
    assert complete_checkpoints(tmp_path) == [whole]
    assert half_written(tmp_path) == [tmp_path / ".step-000005.partial"]
    assert damage_of(cut) == "state/weights.pt has 2 bytes instead of 3"
    assert damage_of(missing) == "state/weights.pt is missing"
    assert str(damage_of(half)).startswith("its manifest is damaged (")


def test_a_file_that_somebody_left_beside_the_others_does_no_harm_and_is_named(tmp_path: Path) -> None:
    checkpoint = make(tmp_path, 1)
    (checkpoint / "state" / "note.txt").write_text("best so far")
    assert newest_complete(tmp_path) == checkpoint
    assert unknown_files(checkpoint) == ["state/note.txt"]


def test_a_manifest_tells_all(tmp_path: Path) -> None:
    manifest = read_manifest(make(tmp_path, 7))
    assert (manifest["step"], manifest["run"], manifest["saved_at"]) == (7, RUN, 1.5)
    assert manifest["config"] == digest({"lr": 3e-4}) != digest({"lr": 4e-4})
    assert files_of(manifest) == {
        name: FileRecord(len(data), checksum(tmp_path / "step-000007" / name))
        for name, data in CONTENT.items()
    }


@pytest.mark.parametrize(
    "key", ["step", "run", "identity", "config", "versions", "saved_at", "files", "format"]
)
def test_a_manifest_that_was_changed_is_found(key: str, tmp_path: Path) -> None:
    checkpoint = make(tmp_path, 7)
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    (checkpoint / MANIFEST).write_text(json.dumps(manifest | {key: "else"}))
    assert damage_of(checkpoint) == "its manifest is damaged (its own checksum does not match)"
    del manifest[key]
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    assert damage_of(checkpoint) == "its manifest is damaged (its own checksum does not match)"


@pytest.mark.parametrize(
    "text", ["", "[]", "7", "null", "{}", '{"step": 7}', '{"step": 7, "files": []}', "\0"]
)
def test_what_is_no_manifest(text: str, tmp_path: Path) -> None:
    checkpoint = make(tmp_path, 7)
    (checkpoint / MANIFEST).write_text(text)
    assert damage_of(checkpoint) is not None and complete_checkpoints(tmp_path) == []


def test_a_folder_under_another_steps_name(tmp_path: Path) -> None:
    make(tmp_path, 7).rename(tmp_path / "step-000008")
    assert damage_of(tmp_path / "step-000008") == "its manifest belongs to step 7"


def test_wrong_bytes_of_the_right_size_are_found_by_reading(tmp_path: Path) -> None:
    checkpoint = make(tmp_path, 7)
    files = files_of(read_manifest(checkpoint))
    read: list[int] = []
    assert wrong_files(checkpoint, files, files, on_bytes=read.append) == {}
    assert sum(read) == sum(file_sizes(checkpoint).values()) == 8
    (checkpoint / "state" / "weights.pt").write_bytes(b"abd")
    (checkpoint / "script.py").unlink()
    assert damage_of(checkpoint) == "script.py is missing"
    assert wrong_files(checkpoint, files, files) == {
        "state/weights.pt": "state/weights.pt does not match its checksum",
        "script.py": "script.py is missing",
    }
    assert wrong_files(checkpoint, files, ["state/optimizer.pt"]) == {}


def test_an_earlier_manifest_has_sizes_alone(tmp_path: Path) -> None:
    checkpoint = make_earlier(tmp_path, 7)
    files = files_of(read_manifest(checkpoint))
    assert files == {"state/weights.pt": FileRecord(3, None)}
    (checkpoint / "state" / "weights.pt").write_bytes(b"xyz")
    assert wrong_files(checkpoint, files, files) == {}
    assert choose_newest(tmp_path, RUN).checkpoint == checkpoint, "whose it is can't be told"


def test_damage_that_was_found_is_remembered_until_it_is_taken_back(tmp_path: Path) -> None:
    checkpoint = make(tmp_path, 7)
    note_damage(checkpoint, "state/weights.pt does not match its checksum")
    assert damage_of(checkpoint) == "state/weights.pt does not match its checksum"
    assert damage_of(checkpoint, noted=False) is None
    assert unknown_files(checkpoint) == []
    forget_damage(checkpoint)
    forget_damage(checkpoint)
    assert damage_of(checkpoint) is None


def test_the_newest_usable_one_is_chosen_and_the_others_named(tmp_path: Path) -> None:
    assert choose_newest(tmp_path, RUN).checkpoint is None
    for step in (1, 2, 3, 4):
        make(tmp_path, step, run="f" * 16 if step == 4 else RUN)
    (tmp_path / "step-000003" / MANIFEST).unlink()
    choice = choose_newest(tmp_path, RUN, {"step-000002": "seen"})
    assert choice.checkpoint == tmp_path / "step-000001"
    assert choice.passed == (
        ("step-000004", f"it belongs to another run ({'f' * 16}, this one is {RUN})"),
        ("step-000003", "it has no manifest"),
        ("step-000002", "seen"),
    )


def test_none_usable_is_an_error_with_every_reason(tmp_path: Path) -> None:
    for step in (1, 2):
        (make(tmp_path, step) / MANIFEST).unlink()
    with pytest.raises(DstrainError) as error:
        choose_newest(tmp_path, RUN)
    text = str(error.value)
    assert text.startswith(
        f"{tmp_path}: no checkpoint of this run is usable:\n  step-000002: it has no manifest\n"
    )
    assert "step-000001: it has no manifest" in text and "hint: " in text


def test_the_id_of_a_run_is_drawn_once(tmp_path: Path) -> None:
    file, checkpoints = tmp_path / "run-id", tmp_path / "checkpoints"
    assert run_id(file, checkpoints) is None
    drawn = keep_run_id(file, checkpoints)
    assert keep_run_id(file, checkpoints) == run_id(file, checkpoints) == drawn and len(drawn) == 16
    assert keep_run_id(tmp_path / "other", checkpoints) != drawn


@pytest.mark.parametrize("lost", ["", "half", None])
def test_an_id_that_was_lost_is_taken_from_the_newest_checkpoint(lost: str | None, tmp_path: Path) -> None:
    file, checkpoints = tmp_path / "run-id", tmp_path / "checkpoints"
    make(checkpoints, 1)
    make_earlier(checkpoints, 2)
    if lost is not None:
        file.write_text(lost)
    assert keep_run_id(file, checkpoints) == RUN == file.read_text().strip()


def test_shares_hold_each_file_once_and_are_about_even() -> None:
    sizes = {f"file {n}": size for n, size in enumerate([9, 8, 5, 5, 4, 4, 1, 0])}
    shares = share_out(sizes, 3)
    assert sorted(name for share in shares for name in share) == sorted(sizes)
    assert sorted(sum(sizes[name] for name in share) for share in shares) == [11, 12, 13]
    assert share_out({"one": 1}, 3) == [["one"], [], []]


@pytest.mark.parametrize(
    "look",
    [
        pytest.param(lambda run: complete_checkpoints(run / "checkpoints")[-1].name, id="complete"),
        pytest.param(lambda run: choose_newest(run / "checkpoints", RUN).checkpoint.name, id="newest"),
        pytest.param(lambda run: run_id(run / "run_id", run / "checkpoints") and "step-000003", id="run id"),
        pytest.param(lambda run: Path(checkpoints(run)[-1].path).name, id="list"),
        pytest.param(lambda run: Path(checkpoints(run, verify=True)[-1].path).name, id="verify"),
    ],
)
def test_a_checkpoint_may_be_removed_at_any_moment(
    look: Callable[[Path], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that trains removes old checkpoints while its supervisor, or another command, looks at all of them."""
    moments = 0
    while True:
        run = tmp_path / str(moments)
        (run / "checkpoints").mkdir(parents=True)
        (run / "config.yaml").touch()
        old, _, newest = (make(run / "checkpoints", step) for step in (1, 2, 3))
        with monkeypatch.context() as patch:
            calls = _removing(old, moments, patch)
            assert look(run) == newest.name
        if next(calls) <= moments:
            break
        moments += 1
    assert moments > 5


def _removing(folder: Path, after: int, patch: pytest.MonkeyPatch) -> Iterator[int]:
    """Remove ``folder`` before the call to the system that comes after so many. A count of them."""
    calls = itertools.count()
    remove = shutil.rmtree

    def before(call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **options: Any) -> Any:
            if next(calls) == after:
                with pytest.MonkeyPatch.context() as real:
                    for module, name, function in functions:
                        real.setattr(module, name, function)
                    remove(folder)
            return call(*arguments, **options)

        return called

    functions = [(os, name, getattr(os, name)) for name in ("stat", "scandir", "listdir")]
    functions.append((io, "open", io.open))
    for module, name, function in functions:
        patch.setattr(module, name, before(function))
    return calls
