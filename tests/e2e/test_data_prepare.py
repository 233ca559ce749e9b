"""``dstrain data prepare``: tokens for a later run, made once, by any number of workers; nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.support.bad_inputs.row import GOOD
from tests.support.e2e import Said, one_message, start


@pytest.fixture(autouse=True)
def own_cache(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing of another test's is there already."""
    monkeypatch.setenv("DSTRAIN_CACHE", str(place / "cache"))
    return place / "cache" / "data"


def test_a_second_call_and_a_plan_find_what_is_there(
    place: Path, own_cache: Path, dstrain_here: Callable[..., Said]
) -> None:
    first = dstrain_here("data", "prepare", *GOOD)
    assert first.code == 0, first
    assert first.out.startswith("text.jsonl: 40 documents, ") and "prepared in" in first.out
    [folder] = (path for path in own_cache.iterdir() if (path / "tokens.bin").exists())
    assert str(folder) in first.out
    again = dstrain_here("data", "prepare", *GOOD)
    assert again.code == 0 and f"was there already: {folder}" in again.out and "prepared" not in again.out
    longer = dstrain_here("data", "prepare", *GOOD, "--seq-len", "16")
    assert f"was there already: {folder}" in longer.out
    made = folder.stat().st_ino
    assert dstrain_here("plan", *GOOD).code == 0
    assert folder.stat().st_ino == made


def test_as_json(place: Path, dstrain_here: Callable[..., Said]) -> None:
    said = dstrain_here("data", "prepare", *GOOD, "--workers", "0", "--json")
    [source] = json.loads(said.out)
    assert (source["name"], source["was_there"], source["data"]["documents"]) == ("text", False, 40)
    assert (Path(source["folder"]) / "tokens.bin").stat().st_size == 2 * source["data"]["tokens"]


def test_workers_give_the_same(place: Path, own_cache: Path, dstrain: Callable[..., Said]) -> None:
    found = []
    for workers in ("0", "2"):
        said = dstrain("data", "prepare", *GOOD, "--workers", workers, "--json")
        assert said.code == 0, said
        [source] = json.loads(said.out)
        folder = Path(source["folder"])
        found.append({path.name: path.read_bytes() for path in folder.iterdir()})
        folder.rename(folder.with_name(f"workers{workers}"))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "nowhere.jsonl"], ["nowhere.jsonl", "there is no such file"]),
        (["--workers", "-1"], ["--workers"]),
        (["--workers", "many"], ["--workers"]),
        (["--data", "bad.jsonl"], ["bad.jsonl:2", "not JSON"]),
        (["--tokenizer", "nowhere"], ["nowhere"]),
        (["--set", "stpes=1"], ["stpes"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_mistakes(
    arguments: list[str], words: list[str], place: Path, dstrain_here: Callable[..., Said]
) -> None:
    (place / "bad.jsonl").write_text('{"text": "fine"}\nbad\n')
    one_message(dstrain_here("data", "prepare", *GOOD, *arguments), words)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_whoever_ends_it_leaves_no_process_behind(
    number: signal.Signals, place: Path, own_cache: Path
) -> None:
    lines = [json.dumps({"text": f"document {n} " + "some words of a text, " * 30}) for n in range(60_000)]
    (place / "large.jsonl").write_text("\n".join(lines))
    arguments = ["data", "prepare", *GOOD, "--data", "large.jsonl", "--workers", "2"]
    command = start(place, os.environ, *arguments)
    try:
        until = time.monotonic() + 120
        while (
            len(children := psutil.Process(command.pid).children(recursive=True)) < 3
            and command.poll() is None
        ):
            assert time.monotonic() < until
            time.sleep(0.02)
        os.kill(command.pid, number)
        command.wait(60)
        assert not psutil.wait_procs(children, timeout=30)[1]
    finally:
        if command.poll() is None:
            os.kill(command.pid, signal.SIGKILL)
    # On a busy machine it may have ended before the signal came.
    whole = [path for path in own_cache.iterdir() if (path / "meta.json").exists()]
    assert command.poll() == 0 or not whole
