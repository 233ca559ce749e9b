"""``dstrain checkpoints``, what `resume` says of damaged ones, and a disk that is too small."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dstrain.runs.checkpoint.manifest import DAMAGED, MANIFEST, FileRecord, checksum, make_manifest
from tests.support.e2e import Said

IDENTITY = {"zero": 2, "pipeline": 2, "data_parallel": 4, "schedule": "1f1b", "offload": "none"}
RUN = "0123456789abcdef"


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture
def saved(place: Path) -> Path:
    """A run folder with three checkpoints of 2,000 bytes and half of a fourth."""
    folder = place / "runs" / "saved"
    for step in (2, 4, 6):
        checkpoint = folder / "checkpoints" / f"step-{step:06d}"
        (checkpoint / "state").mkdir(parents=True)
        files = {}
        for name in ("state/model.pt", "state/optimizer.pt"):
            (checkpoint / name).write_bytes(bytes([step]) * 1000)
            files[name] = FileRecord(1000, checksum(checkpoint / name))
        manifest = make_manifest(
            step=step, run=RUN, identity=IDENTITY, config={}, versions={"dstrain": "0.1.0"}, saved_at=1e9 + step,
            files=files,
        )  # fmt: skip
        (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    (folder / "checkpoints" / ".step-000008.partial").mkdir()
    (folder / "config.yaml").write_text("steps: 10\n")
    (folder / "run-id").write_text(RUN + "\n")
    lines = [json.dumps({"step": step, "loss": 7 - step / 2, "lr": 1.0}) + "\n" for step in range(1, 8)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def state(said: Said) -> dict[int, dict[str, Any]]:
    return {record["step"]: record for record in json.loads(said.out)["checkpoints"]}


def test_the_table(saved: Path, dstrain_here: Callable[..., Said], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    said = dstrain_here("checkpoints", "saved")
    assert said.code == 0 and not said.err
    lines = said.out.splitlines()
    assert "checkpoints of saved" in lines[0]
    for step, loss in ((2, "6.0000"), (4, "5.0000"), (6, "4.0000")):
        line = next(line for line in lines if f" {step} " in line and loss in line)
        for word in ("2 kB", "zero2-pp2-dp4", f"2001-09-09 01:46:4{step}", "complete"):
            assert word in line
    assert any(" 8 " in line and "half-written" in line for line in lines)


def test_json_and_verify(saved: Path, dstrain_here: Callable[..., Said]) -> None:
    said = dstrain_here("checkpoints", "saved", "--verify", "--json")
    assert said.code == 0
    records = state(said)
    assert [records[step]["state"] for step in (2, 4, 6, 8)] == ["complete"] * 3 + ["half-written"]
    assert records[6] == {
        "step": 6, "path": str(saved / "checkpoints" / "step-000006"), "bytes": 2000, "layout": "zero2-pp2-dp4",
        "loss": 4.0, "saved_at": 1e9 + 6, "state": "complete", "why": None, "versions": {"dstrain": "0.1.0"},
        "checksums": True, "unknown_files": [],
    }  # fmt: skip


def test_verify_finds_what_sizes_do_not_tell_and_notes_it(
    saved: Path, dstrain_here: Callable[..., Said]
) -> None:
    newest = saved / "checkpoints" / "step-000006"
    flip_a_bit(newest / "state" / "optimizer.pt")
    (newest / "note.txt").write_text("mine")
    assert dstrain_here("checkpoints", "saved").code == 0
    said = dstrain_here("checkpoints", "saved", "--verify")
    assert said.code == 1
    assert "damaged: state/optimizer.pt does not match its checksum" in " ".join(said.out.split())
    assert "step 6 contains files that are not in its manifest and are ignored: note.txt" in said.out
    assert dstrain_here("checkpoints", "saved").code == 1, "it was noted"

    flip_a_bit(newest / "state" / "optimizer.pt")
    assert dstrain_here("checkpoints", "saved", "--verify").code == 0, "mended"
    assert not (newest / DAMAGED).exists() and dstrain_here("checkpoints", "saved").code == 0


@pytest.mark.parametrize(
    ("injure", "why"),
    [
        (lambda folder: (folder / "state" / "model.pt").unlink(), "state/model.pt is missing"),
        (lambda folder: os.truncate(folder / "state" / "model.pt", 5), "state/model.pt has 5 bytes"),
        (lambda folder: (folder / MANIFEST).unlink(), "it has no manifest"),
        (lambda folder: (folder / MANIFEST).write_text("{"), "its manifest is damaged"),
        (lambda folder: flip_a_bit(folder / MANIFEST), "its manifest"),
    ],
)
def test_what_is_damaged_is_said_without_reading(
    injure: Callable[[Path], Any], why: str, saved: Path, dstrain_here: Callable[..., Said]
) -> None:
    injure(saved / "checkpoints" / "step-000004")
    said = dstrain_here("checkpoints", "saved", "--json")
    assert said.code == 1
    records = state(said)
    assert records[4]["state"] == "damaged" and why in records[4]["why"]
    assert records[2]["state"] == records[6]["state"] == "complete"


def test_of_another_run(saved: Path, dstrain_here: Callable[..., Said]) -> None:
    (saved / "run-id").write_text("f" * 16)
    said = dstrain_here("checkpoints", "saved", "--json")
    assert said.code == 1 and "belongs to another run" in state(said)[6]["why"]


def test_none_yet(place: Path, dstrain_here: Callable[..., Said]) -> None:
    (place / "runs" / "new").mkdir(parents=True)
    (place / "runs" / "new" / "config.yaml").write_text("steps: 1\n")
    said = dstrain_here("checkpoints", "new")
    assert (said.code, said.out, said.err) == (0, "new has no checkpoint\n", "")


def test_resume_never_starts_anew_in_silence(saved: Path, dstrain_here: Callable[..., Said]) -> None:
    for step in (2, 4, 6):
        flip_a_bit(saved / "checkpoints" / f"step-{step:06d}" / "state" / "model.pt")
    assert dstrain_here("checkpoints", "saved", "--verify").code == 1
    said = dstrain_here("resume", "saved", "--dry-run")
    assert said.code == 2 and "no checkpoint of this run is usable" in said.err
    assert all(
        f"step-{step:06d}: state/model.pt does not match its checksum" in said.err for step in (2, 4, 6)
    )
    assert "hint: " in said.err and "Traceback" not in said.err


def test_a_disk_that_is_too_small_is_refused(
    place: Path, dstrain_here: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 1_500_000))
    arguments = ("--model", "model", "--data", "text.jsonl", "--seq-len", "32", "--name", "x", "--dry-run")
    said = dstrain_here("run", *arguments, "--save-every", "1", "--keep", "9", "--verbose")
    assert said.code == 2 and "are free for them" in said.err and "hint: --keep " in said.err, said.err
    assert "disk    about " in said.out and "(10 at once: keep 9, and the one being written)" in said.out
    assert dstrain_here("run", *arguments, "--save-every", "0", "--keep", "1").code == 0


@pytest.mark.timeout(300)
def test_a_damaged_newest_one_is_reported_and_the_one_before_is_used(
    place: Path, dstrain: Callable[..., Said]
) -> None:
    arguments = ["--model", "model", "--data", "text.jsonl", "--seq-len", "32", "--global-batch", "8"]
    arguments += ["--data-parallel", "2", "--steps", "6", "--save-every", "2", "--set", "sample_tokens=0"]
    said = dstrain("run", *arguments, "--name", "hurt")
    assert said.code == 0, said.out + said.err
    folder = place / "runs" / "hurt"
    before = (folder / "metrics.jsonl").read_text().splitlines()
    listed = dstrain("checkpoints", "hurt", "--verify", "--json")
    assert listed.code == 0
    assert {step: record["layout"] for step, record in state(listed).items()} == dict.fromkeys(
        (4, 6), "zero1-pp1-dp2"
    )
    assert state(listed)[6]["loss"] == json.loads(before[-1])["loss"]

    flip_a_bit(next((folder / "checkpoints" / "step-000006" / "state").glob("*optim_states.pt")))
    said = dstrain("resume", "hurt", "--steps", "8")
    assert said.code == 0, said.out + said.err
    notes = [line for line in said.out.splitlines() if line.startswith("note   step-000006 is skipped: ")]
    assert len(notes) == 1 and "does not match its checksum" in notes[0], said.out
    assert "step-000006 is skipped: " in (folder / "logs" / "rank-0.log").read_text()
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(9))
    losses = {record["step"]: record["loss"] for record in map(json.loads, before[1:])}
    # Step 5 was computed anew from step 4; the learning rates after it are those of a longer run.
    assert [records[step]["loss"] for step in range(1, 6)] == [losses[step] for step in range(1, 6)]
    assert dstrain("checkpoints", "hurt", "--verify").code == 0
