"""``--data org/name``: a data set on the hub, with a small server in its place, from the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dstrain.runs.run_folder import RunFolder, read_metrics
from tests.support.data_hub import COMMIT, OLDER, REPOSITORIES, DataHub, parquet
from tests.support.e2e import Said, one_message

GOOD = ["--model", "model", "--seq-len", "16", "--name", "x", "--global-batch", "4"]


def command(place: Path, repository: Path, *arguments: str) -> Said:
    """Run in an interpreter of its own, and no fork: the library learns where the hub is when it is imported."""
    done = subprocess.run(
        [sys.executable, "-m", "dstrain.cli.main", *arguments],
        cwd=place,
        env=os.environ | {"PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    return Said(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[DataHub]:
    """The server, which the commands of a test are told of."""
    for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path_factory.mktemp("home")))
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "0")
    with DataHub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        yield server


@pytest.mark.heavy
def test_a_run_trains_on_data_sets_of_the_hub(
    hub: DataHub, place: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [
        {"path": "tiny/texts", "split": "test", "revision": OLDER, "name": "one", "validation": 0.0},
        {"path": "tiny/texts", "name": "two", "limit": 20},
    ]
    (place / "c.yaml").write_text(json.dumps({"data": sources, "steps": 2, "sample_tokens": 0}))
    planned = command(place, repository, "plan", *GOOD, "--config", "c.yaml", "--json")
    assert planned.code == 0, planned
    found = json.loads(planned.out)["data"]["sources"]
    assert [source["data"]["documents"] for source in found] == [1, 20]
    assert f"of tiny/texts@{OLDER}, split test, at commit {OLDER[:12]}" in found[0]["data"]["kinds"]
    assert f"of tiny/texts, split train, at commit {COMMIT[:12]}" in found[1]["data"]["kinds"]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    again = command(place, repository, "plan", *GOOD, "--data", "tiny/texts")
    assert again.code == 0 and "tiny/texts, split train: what was fetched before serves" in again.err
    said = command(place, repository, "run", *GOOD, "--config", "c.yaml")
    assert said.code == 0, said


@pytest.mark.heavy
def test_a_run_goes_on_with_the_commit_that_it_has_begun_with(
    hub: DataHub, place: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [
        *GOOD,
        "--data",
        "tiny/texts",
        "--steps",
        "2",
        "--save-every",
        "1",
        "--set",
        "sample_tokens=0",
    ]
    said = command(place, repository, "run", *arguments)
    assert said.code == 0, said
    hub.commit = "f" * 40
    other = {"train.parquet": parquet(*[f"another text is number {n}" for n in range(30)])}
    monkeypatch.setitem(REPOSITORIES, "tiny/texts", other)
    planned = command(place, repository, "plan", *GOOD, "--data", "tiny/texts", "--json")
    assert json.loads(planned.out)["data"]["commit"] == hub.commit
    said = command(place, repository, "resume", "x", "--steps", "4")
    assert said.code == 0, said
    assert json.loads((place / "runs/x/plan.json").read_text())["data"]["commit"] == COMMIT
    said = command(place, repository, "reproduce", "x")
    assert said.code == 0 and "bit-equal: all 2 steps" in said.out, said


@pytest.mark.heavy
def test_a_stream_of_a_data_set_goes_on_as_it_would_from_files_that_are_here(
    hub: DataHub, place: Path, repository: Path
) -> None:
    stream = ["--set", "data_stream=true", "--set", "sample_tokens=0", "--set", "validation=0.02"]
    stream += ["--set", "lr_schedule=constant", "--set", "warmup_steps=0", "--set", "lr=1.0e-3"]
    run = [
        "run",
        *GOOD[:4],
        "--global-batch",
        "4",
        "--micro-batch",
        "2",
        *stream,
        "--save-every",
        "2",
        "--set",
        "eval_samples=2",
    ]
    for name, content in REPOSITORIES["tiny/shards"].items():
        (place / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        (place / "copy" / name).write_bytes(content)
    said = command(place, repository, *run, "--data", "copy", "--steps", "60", "--name", "whole")
    assert said.code == 0, said
    data = ["--data", "tiny/shards"]
    said = command(place, repository, *run, *data, "--steps", "40", "--name", "x")
    assert said.code == 0, said
    assert "7 files (text, 1.34 kB), streamed: tokens are counted while training" in said.out, said.out
    assert hub.served.count(sorted(REPOSITORIES["tiny/shards"])[0]) == 1
    hub.commit = "f" * 40
    said = command(place, repository, "resume", "x", "--steps", "60", "--data-parallel", "2")
    assert said.code == 0, said
    losses = [
        [
            record["loss"]
            for record in read_metrics(RunFolder(place / "runs" / name).metrics)
            if record["step"]
        ]
        for name in ("x", "whole")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert not list(Path(os.environ["DSTRAIN_CACHE"]).glob("streams/*"))


def test_what_the_hub_does_not_give_is_one_message(hub: DataHub, place: Path, repository: Path) -> None:
    words = ["--data", "'tiny/none' is neither a file or folder here nor a data set on the hub", "hint"]
    one_message(command(place, repository, "plan", *GOOD, "--data", "tiny/none"), words)
    hub.status = 503
    words = ["--data", "does not answer as it should", "hint"]
    one_message(command(place, repository, "plan", *GOOD, "--data", "tiny/chat"), words)
