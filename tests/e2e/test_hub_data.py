"""``--data org/name``: a data set on the hub, with a small server in its place, from the command line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.data_hub import COMMIT, DataHub
from tests.support.e2e import Said, one_message

GOOD = ["--model", "model", "--seq-len", "16", "--name", "x", "--global-batch", "4"]


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


def test_a_run_trains_on_a_data_set_of_the_hub(
    hub: DataHub, place: Path, dstrain: Callable[..., Said], dstrain_here: Callable[..., Said], monkeypatch
) -> None:
    planned = dstrain_here("plan", *GOOD, "--data", "tiny/texts", "--json")
    assert planned.code == 0, planned
    data = json.loads(planned.out)["data"]
    assert (data["source"], data["documents"]) == ("tiny/texts", 30)
    assert f"of tiny/texts, split train, at commit {COMMIT[:12]}" in data["kinds"]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # what was fetched serves
    again = dstrain_here("plan", *GOOD, "--data", "tiny/texts", "--json")
    assert json.loads(again.out)["data"] == data
    assert "what was fetched before serves, since HF_HUB_OFFLINE" in again.err
    said = dstrain("run", *GOOD, "--data", "tiny/texts", "--steps", "2", "--set", "sample_tokens=0")
    assert said.code == 0, said


def test_what_the_hub_does_not_give_is_one_message(
    hub: DataHub, place: Path, dstrain_here: Callable[..., Said]
) -> None:
    missing = dstrain_here("plan", *GOOD, "--data", "tiny/none")
    one_message(
        missing, ["--data", "'tiny/none' is neither a file or folder here nor a data set on the hub", "hint"]
    )
    one_message(
        dstrain_here("plan", *GOOD, "--data", "tiny/texts@v9"), ["--data", "has no revision 'v9'", "branches"]
    )
    hub.status = 503
    one_message(
        dstrain_here("plan", *GOOD, "--data", "tiny/chat"),
        ["--data", "does not answer as it should", "hint"],
    )
