"""Streams of data sets on the hub: their files come one by one, from a small server in its place."""

import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

from dstrain.data.listing.hub_names import HubName
from dstrain.data.streaming.blocks import shard_order
from dstrain.data.streaming.hub_listing import read_files
from dstrain.data.streaming.making import make_rows
from dstrain.data.streaming.prepare import summarise
from dstrain.data.streaming.shard_files import AHEAD
from dstrain.data.streaming.state import StreamState
from dstrain.data.streaming.stream import Stream, StreamRequest
from dstrain.errors import DstrainError
from dstrain.shared_caches import clear_leftovers
from tests.data.test_stream_making import contents
from tests.support.data_hub import COMMIT, REPOSITORIES, DataHub, lines
from tests.support.streaming.killed import KilledTraining

SHARDS = sorted(REPOSITORIES["tiny/shards"])


@pytest.fixture
def hub(tmp_path, monkeypatch):
    for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "0")
    with DataHub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        yield server


def request_of(place, source="tiny/shards", seq_len=16, **others):
    options = {"revision": COMMIT, "cache": str(place / "cache"), "window": 16, "characters": 2000} | others
    return StreamRequest(source, "bytes", seq_len, 3, **options)


def open_stream(place, **others):
    return Stream.open(request_of(place, **others), place / "passing")


def local_copy(place, repository="tiny/shards"):
    """The same files in a folder."""
    for name, content in REPOSITORIES[repository].items():
        path = place / "local" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return Stream.open(request_of(place, str(place / "local"), revision=None))


def refusal_of(made):
    with pytest.raises(DstrainError) as refused:
        list(made)
    return refused.value


def test_the_rows_are_those_of_the_files_and_a_few_files_lie_here_at_a_time(hub, tmp_path):
    stream = open_stream(tmp_path)
    assert hub.served == SHARDS[:1], "the first file tells the format"
    seen, most, epochs = [], 0, set()
    for made in make_rows(stream, StreamState()):
        if made.state.place.epoch == 2:
            break
        epochs.add(made.state.place.epoch)
        seen.append(made)
        here = list((tmp_path / "passing").rglob("*.jsonl.gz"))
        most = max(most, len(here))
    assert epochs == {0, 1}
    assert 1 < most <= AHEAD + 1
    expected = contents(islice(make_rows(local_copy(tmp_path), StreamState()), len(seen)))
    assert contents(seen) == expected
    assert hub.served.count(SHARDS[0]) == 1, "which is kept"
    assert all(2 <= hub.served.count(name) <= 3 for name in SHARDS[1:])


def test_going_on_fetches_what_comes_from_there_on(hub, tmp_path):
    stream = open_stream(tmp_path)
    made = list(islice(make_rows(stream, StreamState()), 40))
    begin = next(one for one in made if one.state.place.shard == 3)
    expected = contents(made)
    hub.served.clear()
    again = open_stream(tmp_path)
    rows = make_rows(again, StreamState.from_json(json.loads(json.dumps(begin.state.to_json()))))
    found = contents([next(rows)])
    rows.close()
    assert found and all(expected[row] == content for row, content in found.items())
    order = [SHARDS[number] for number in shard_order(again, 0)]
    following = [name for name in order[3:] if name != SHARDS[0]]
    assert hub.served == following[: len(hub.served)] and len(hub.served) <= AHEAD + 1
    assert not (tmp_path / "passing").exists(), "and nothing is left of it"


@pytest.mark.heavy
def test_killed_at_any_moment_and_gone_on_with_other_replicas(hub, tmp_path):
    training = KilledTraining(tmp_path / "run", request_of(tmp_path), seed="hub")
    for number in range(4):
        training.kill_one((4, 2)[number % 2])
    training.finish(2, training.saved + 20)
    fetched = len(hub.served)
    training.check()
    assert "producer" in training.victims and training.saved > 20
    assert fetched > len(SHARDS)
    clear_leftovers(tmp_path / "run")  # of a launch whose first replica was killed, as the next start does
    assert not list((tmp_path / "run" / "streams").rglob("*.jsonl.gz"))


def test_a_server_that_fails_some_times(hub, tmp_path, capfd):
    stream = open_stream(tmp_path)
    hub.failing = {SHARDS[3]: 2}
    expected = contents(islice(make_rows(local_copy(tmp_path), StreamState()), 30))
    assert contents(islice(make_rows(stream, StreamState()), 30)) == expected
    assert hub.failing[SHARDS[3]] == 0
    assert f"dstrain: {SHARDS[3]}: the hub answers 500; again in 1 s" in capfd.readouterr().err


def test_a_file_that_is_another_one(hub, tmp_path, monkeypatch):
    stream = open_stream(tmp_path)
    changed = {**REPOSITORIES["tiny/shards"], SHARDS[2]: b"another"}
    monkeypatch.setitem(REPOSITORIES, "tiny/shards", changed)
    refused = refusal_of(make_rows(stream, StreamState()))
    assert refused.where == f"hf://datasets/tiny/shards@{COMMIT}/{SHARDS[2]}"
    assert "another one than was listed: 7 bytes" in refused.message
    assert "HF_ENDPOINT" in refused.hint
    assert not (tmp_path / "passing").exists()


def test_a_file_that_is_gone(hub, tmp_path, monkeypatch):
    stream = open_stream(tmp_path)
    left = {name: content for name, content in REPOSITORIES["tiny/shards"].items() if name != SHARDS[4]}
    monkeypatch.setitem(REPOSITORIES, "tiny/shards", left)
    refused = refusal_of(make_rows(stream, StreamState()))
    assert refused.where.endswith(SHARDS[4]) and "not on the hub any more" in refused.message


def test_without_a_network(hub, tmp_path, monkeypatch):
    stream = open_stream(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert open_stream(tmp_path).fingerprint == stream.fingerprint
    refused = refusal_of(make_rows(stream, StreamState()))
    assert refused.where.startswith(f"hf://datasets/tiny/shards@{COMMIT}/data/train-")
    assert "HF_HUB_OFFLINE prevents access" in refused.message
    assert f"hf download tiny/shards --repo-type dataset --revision {COMMIT}" in refused.hint
    # The way out:
    asked = f"'tiny/shards', repo_type='dataset', revision='{COMMIT}'"
    command = f"import huggingface_hub; huggingface_hub.snapshot_download({asked})"
    environment = os.environ | {"HF_HUB_OFFLINE": "0"}
    subprocess.run([sys.executable, "-c", command], env=environment, check=True, timeout=60)
    hub.served.clear()
    expected = contents(islice(make_rows(local_copy(tmp_path), StreamState()), 30))
    assert contents(islice(make_rows(stream, StreamState()), 30)) == expected
    assert not hub.served


PATIENCE = """
import sys
from pathlib import Path
from dstrain.data.listing.hub_names import HubName
from dstrain.data.streaming import fetching
from dstrain.data.streaming.hub_listing import read_files
cache, passing = map(Path, sys.argv[1:])
pauses = []
listing = read_files(HubName("tiny/shards", revision="{commit}"), cache)
fetching.fetch_in_order(listing, [1, 2], passing, cache / "none", 2, pauses.append)
print(len(pauses), sum(pauses))
"""


def test_a_server_that_fails_for_good(hub, tmp_path):
    open_stream(tmp_path)
    hub.failing = {SHARDS[2]: 10**6}
    (tmp_path / "passing").mkdir()
    command = [sys.executable, "-c", PATIENCE.format(commit=COMMIT), tmp_path / "cache", tmp_path / "passing"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == ["7", "121"]
    assert "path" in json.loads((tmp_path / "passing/0.json").read_text())
    words = json.loads((tmp_path / "passing/1.json").read_text())["error"]
    assert words["where"].endswith(SHARDS[2])
    assert "can't be fetched from the hub: the hub answers 500" in words["message"]
    assert "then resume the run" in words["hint"]


def test_places_of_records_are_those_on_the_hub(hub, tmp_path, monkeypatch):
    bad = lines({"text": "fine"}) * 5 + b"{no\n"
    monkeypatch.setitem(REPOSITORIES, "tiny/shards", {"a.jsonl": lines({"text": "x"}), "b.jsonl": bad})
    refused = refusal_of(make_rows(open_stream(tmp_path), StreamState()))
    assert refused.where == f"hf://datasets/tiny/shards@{COMMIT}/b.jsonl:6"


def test_conversations_and_tables(hub, tmp_path):
    stream = open_stream(tmp_path, source="tiny/chat", seq_len=32)
    assert stream.corpus.first == f"hf://datasets/tiny/chat@{COMMIT}/train.jsonl:1"
    made = next(make_rows(stream, StreamState()))
    assert made.order.size >= 1
    stream = open_stream(tmp_path, source="tiny/texts", split="test")
    made = next(make_rows(stream, StreamState()))
    text = bytes(made.rows.rows([0]).input_ids[0].astype("uint8")).decode()
    assert text == "a test of these "


def test_what_the_plan_says(hub, tmp_path):
    found = summarise(request_of(tmp_path), 0.1, 8)
    size = sum(map(len, REPOSITORIES["tiny/shards"].values()))
    assert (found["files"], found["bytes"], found["validation_rows"] >= 8) == (7, size, True)
    assert set(hub.served) <= set(SHARDS) and len(hub.served) == len(set(hub.served))
    other = summarise(request_of(tmp_path, revision=None), 0.1, 8)
    assert other["fingerprint"] == found["fingerprint"], "the files decide, and no name of them"


ASK = """
import json, sys
from pathlib import Path
import datasets
from dstrain.data.listing.hub_names import HubName
from dstrain.data.streaming.hub_shards import list_files
from dstrain.errors import DstrainError
datasets.disable_progress_bars()
answers = []
for request in json.loads(sys.argv[1]):
    try:
        found = list_files(HubName(**request), Path(sys.argv[2]), lambda note: answers.append(note))
        answers.append([[file.path, file.kind, file.size] for file in found.files])
    except DstrainError as error:
        answers.append([error.message, error.hint])
print(json.dumps(answers))
"""
CARD = "---\nconfigs:\n- config_name: default\n  data_files: {}\n{}---\n"
LISTED = {
    "tiny/texts": {"data/train-00000-of-00001.parquet": "parquet"},
    "tiny/shards": dict.fromkeys(SHARDS, "json lines"),
    "own/sorted": {"b.csv": "csv", "c.csv": "csv"},
    "own/tabs": {"a.tsv": "csv"},
}
OWN = {
    "own/sorted": {
        "README.md": CARD.format("'[bc].csv'", "").encode(),
        **dict.fromkeys(("c.csv", "b.csv", "a.csv"), b"text\na\n"),
    },
    "own/tabs": {"a.tsv": b"text\tn\na\t1\n"},
    "own/texts": {"a.txt": b"a text"},
    "own/separator": {"README.md": CARD.format("a.csv", "  sep: ;\n").encode(), "a.csv": b"text;n\na;1\n"},
    "own/field": {"README.md": CARD.format("a.json", "  field: rows\n").encode(), "a.json": b'{"rows": []}'},
    "own/packed": {"a.csv.gz": b"?"},
    "own/pictures": {"train/a.png": b"?"},
    "own/elsewhere": {"README.md": CARD.format("https://example.org/a.jsonl", "").encode()},
}
REFUSED = {
    "own/texts": ["can't be streamed", "reads its files as 'text'", "data_stream to false"],
    "own/separator": ["can't be streamed", "sep=';'"],
    "own/field": ["can't be streamed", "field='rows'"],
    "own/packed": ["can't be streamed", "a.csv.gz is packed"],
    "own/pictures": ["can't be streamed", "imagefolder"],
    "tiny/script": ["made by code of its own"],
    "tiny/nothing": ["no files that the datasets library can read"],
    "tiny/configs": ["several configs", "english, german"],
}


def test_listings(hub, tmp_path, monkeypatch):
    for name, files in OWN.items():
        monkeypatch.setitem(REPOSITORIES, name, files)
    requests = [{"repository": name} for name in (*LISTED, *REFUSED)]
    requests.append({"repository": "tiny/texts", "split": "dev"})
    requests.append({"repository": "own/elsewhere"})
    command = [sys.executable, "-c", ASK, json.dumps(requests), str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.splitlines()[-1])
    for (name, expected), found in zip(LISTED.items(), answers, strict=False):
        files = OWN.get(name) or REPOSITORIES[name]
        assert found == [[path, kind, len(files[path])] for path, kind in expected.items()], name
    for (name, words), found in zip(REFUSED.items(), answers[len(LISTED) :], strict=False):
        assert all(word in " ".join(found) for word in words), (name, found)
    assert "no split 'dev'" in answers[-2][0] and "its splits are: test, train" in answers[-2][1]
    assert len(answers[-1]) == 2 and "own/elsewhere" in answers[-1][0]
    kept = read_files(HubName("tiny/shards", revision=COMMIT), Path(tmp_path / "cache"))
    assert [file.path for file in kept.files] == SHARDS
