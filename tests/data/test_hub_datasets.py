"""Data sets on the hub: the library's own code against a small server, in a process of its own as in use."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dstrain.data.chat.options import RecordOptions
from dstrain.data.listing.hub_names import HubName, hub_name
from dstrain.data.listing.sources import find_files
from dstrain.data.prepare import prepare
from dstrain.data.reading.documents import read_records
from dstrain.errors import DstrainError
from tests.support.data_hub import COMMIT, OLDER, DataHub

# One process asks for all: the library takes seconds to load. It answers with what was fetched, or with the error.
ASK = """
import json, sys
from pathlib import Path
import datasets
from dstrain.data.listing.hub_datasets import fetch
from dstrain.data.listing.hub_names import HubName
from dstrain.errors import DstrainError
datasets.disable_progress_bars()
answers = []
for request in json.loads(sys.argv[1]):
    try:
        found = fetch(HubName(**request), Path(sys.argv[2]), lambda note: print(note, file=sys.stderr))
        answers.append({"commit": found.commit, "files": list(found.files)})
    except DstrainError as error:
        answers.append({"message": error.message, "hint": error.hint})
print(json.dumps(answers))
"""


def ask(
    place: Path, endpoint: str, *requests: dict[str, Any], **environment: str
) -> tuple[list[dict[str, Any]], str]:
    """An answer for each request, and what was said meanwhile."""
    online = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(place / "home"),
        "HF_HUB_OFFLINE": "0",
        "HF_DATASETS_OFFLINE": "0",
    }
    done = subprocess.run(
        [sys.executable, "-c", ASK, json.dumps(requests), str(place / "cache")],
        env=os.environ | online | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    answers: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return answers, done.stderr


GOOD = {
    "texts": {"repository": "tiny/texts"},
    "test": {"repository": "tiny/texts", "split": "test"},
    "pinned": {"repository": "tiny/texts", "revision": OLDER},
    "german": {"repository": "tiny/configs", "config": "german"},
    "chat": {"repository": "tiny/chat"},
}
BAD = {
    "no such data set": ({"repository": "tiny/none"}, "neither a file or folder here nor a data set", "./tiny/none is"),
    "gated": ({"repository": "tiny/gated"}, "is a gated data set", "accept its terms"),
    "no such revision": ({"repository": "tiny/texts", "revision": "v9"}, "has no revision 'v9'", "branches and tags"),
    "no such split": (
        {"repository": "tiny/texts", "split": "dev"},
        "the data set tiny/texts has no split 'dev'",
        "its splits are: train, test",
    ),
    "a part of a split": ({"repository": "tiny/texts", "split": "train[:9]"}, "not the name of a split", "limit"),
    "several configs": (
        {"repository": "tiny/configs"}, "several configs, and none is named: english, german", "with config"
    ),
    "no such config": (
        {"repository": "tiny/configs", "config": "french"}, "no config 'french'", "its configs are: english, german"
    ),
    "a script": ({"repository": "tiny/script"}, "no code from the hub is run", "refs/convert/parquet"),
    "no files": ({"repository": "tiny/nothing"}, "no files that the datasets library can read", "hf download tiny/"),
    "a broken file": ({"repository": "tiny/broken"}, "can't be fetched: ", "hf download tiny/broken"),
    "no valid name": ({"repository": "ti--ny/x"}, "nor a valid name on the hub", "check the path (./ti--ny/x"),
}  # fmt: skip


@pytest.fixture(scope="module")
def answered(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Path, dict[str, dict[str, Any]], DataHub]]:
    """The place, and the answer to each of the requests."""
    place = tmp_path_factory.mktemp("hub")
    with DataHub() as hub, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", hub.endpoint)  # what is read is of the server that it was fetched from
        names, requests = [*GOOD, *BAD], [*GOOD.values(), *(row[0] for row in BAD.values())]
        answers, _ = ask(place, hub.endpoint, *requests)
        yield place, dict(zip(names, answers, strict=True)), hub


def test_what_is_fetched_is_read_with_its_place(answered) -> None:
    place, answers, _ = answered
    assert answers["texts"]["commit"] == COMMIT and answers["pinned"]["commit"] == OLDER
    source = find_files("tiny/texts", cache=place / "cache")
    records = list(read_records(source))
    assert [record.fields["text"] for record in records] == [f"text number {n} of these" for n in range(30)]
    assert records[7].where == f"{answers['texts']['files'][0]}: batch 1, row 8"
    assert source.name == "tiny/texts" and source.kinds.endswith(
        f"of tiny/texts, split train, at commit {COMMIT[:12]}"
    )
    for name, found in (
        ("tiny/texts@" + OLDER, [f"text number {n} of these" for n in range(30)]),
        ("tiny/configs", ["eins"]),
    ):
        config = "german" if "configs" in name else None
        listed = find_files(name, cache=place / "cache", config=config)
        assert [record.fields["text"] for record in read_records(listed)] == found
    test = find_files("tiny/texts", cache=place / "cache", split="test")
    assert [record.fields["text"] for record in read_records(test)] == ["a test of these texts, " * 5]


def test_it_is_prepared_as_files_are(answered, tmp_path: Path) -> None:
    place, *_ = answered
    data = prepare("tiny/texts", "bytes", 16, 0.1, place / "cache")
    assert data.documents == 30 and data.summary()["source"] == "tiny/texts"
    chat = prepare("tiny/chat", "bytes", 32, 0.0, place / "cache", records=RecordOptions())
    assert chat.summary()["format"] == "messages" and chat.documents == 20


@pytest.mark.parametrize("name", BAD)
def test_what_the_hub_does_not_give(name: str, answered) -> None:
    answer, (_, words, hint) = answered[1][name], BAD[name]
    assert words in answer["message"] and hint in answer["hint"], answer


def test_a_branch_is_asked_for_again_and_a_commit_is_not(answered) -> None:
    place, _, hub = answered
    hub.asked.clear()
    moved = "f" * 40
    hub.commit = moved
    try:
        answers, said = ask(place, hub.endpoint, {"repository": "tiny/texts"}, GOOD["pinned"])
        assert [answer["commit"] for answer in answers] == [moved, OLDER]
        assert "fetching tiny/texts, split train" in said
        assert not [path for path in hub.asked if OLDER in path]
        hub.asked.clear()
        answers, said = ask(place, hub.endpoint, {"repository": "tiny/texts"})
        assert hub.asked == ["/api/datasets/tiny/texts"] and "fetching" not in said
        assert find_files("tiny/texts", cache=place / "cache").commit == moved
        earlier = find_files("tiny/texts", cache=place / "cache", revision=COMMIT)
        assert earlier.commit == COMMIT, "what was planned with it goes on with it"
        assert (
            COMMIT[:12] in earlier.kinds
            and earlier.files != find_files("tiny/texts", cache=place / "cache").files
        )
        hub.commit = COMMIT
        _, said = ask(place, hub.endpoint, {"repository": "tiny/texts"})
        assert "fetching" not in said and find_files("tiny/texts", cache=place / "cache").commit == COMMIT
    finally:
        hub.commit = COMMIT


def test_without_a_network_what_was_fetched_serves(answered) -> None:
    place, _, hub = answered
    unknown = {"repository": "tiny/unknown"}
    for status, environment, words in (
        (200, {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE prevents access to the hub"),
        (503, {}, "the hub does not answer as it should"),
    ):
        hub.status = status
        try:
            answers, said = ask(place, hub.endpoint, GOOD["german"], unknown, **environment)
        finally:
            hub.status = 200
        assert (
            answers[0]["commit"] == COMMIT
            and "config german, split train: what was fetched before serves" in said
        )
        assert words in answers[1]["message"] and "a folder with its files works" in answers[1]["hint"]


def test_a_branch_is_of_its_server_and_a_commit_is_the_same_on_all(answered, monkeypatch) -> None:
    place, *_ = answered
    nobody = "http://127.0.0.1:9"  # nobody listens at the discard port
    answers, _ = ask(place, nobody, GOOD["german"], GOOD["pinned"])
    assert "the hub can't be reached" in answers[0]["message"] and answers[1]["commit"] == OLDER
    monkeypatch.setenv("HF_ENDPOINT", nobody)
    with pytest.raises(DstrainError, match="was not fetched on this machine"):
        find_files("tiny/texts", cache=place / "cache")
    assert find_files("tiny/texts", cache=place / "cache", revision=COMMIT).commit == COMMIT
    with pytest.raises(DstrainError, match="was not fetched") as refused:
        find_files("tiny/texts", cache=place / "cache", revision="a" * 40)
    assert f"tiny/texts@{'a' * 40} as the source" in str(refused.value.hint)
    monkeypatch.delenv("HF_ENDPOINT")
    default = HubName("tiny/texts").listing(place)
    monkeypatch.setenv("HF_ENDPOINT", "https://huggingface.co/")
    assert HubName("tiny/texts").listing(place) == default


def test_what_is_gone_or_was_never_fetched_is_told(answered, tmp_path: Path) -> None:
    place, *_ = answered
    for name, cache in (("tiny/texts", tmp_path), ("tiny/other", place / "cache")):
        with pytest.raises(DstrainError, match="was not fetched on this machine") as refused:
            find_files(name, cache=cache)
        assert refused.value.where == name and "dstrain plan" in str(refused.value.hint)


def test_names_and_paths_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    assert hub_name("org/name") == HubName("org/name")
    assert hub_name("org/name@v1.0", config="a", split="b") == HubName("org/name", "a", "b", "v1.0")
    assert hub_name("org/name", revision="refs/convert/parquet") == HubName(
        "org/name", None, "train", "refs/convert/parquet"
    )
    for path in (
        "org/name.txt",
        "org/a.parquet",
        "org/a.jsonl.zst",
        "data/name",
        "data",
        "a/b/c",
        "./a",
        "../a",
        "~/a",
        "a/*",
    ):
        assert hub_name(path) is None, path
    with pytest.raises(DstrainError, match="there is no such file or folder"):
        find_files("data/typo", cache=tmp_path)
