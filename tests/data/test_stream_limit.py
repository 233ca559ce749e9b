"""``limit`` of a source that is streamed: the first documents of the sorted files, as without streaming."""

import json
from dataclasses import replace
from itertools import islice, takewhile

import pytest

from dstrain.data.chat.options import RecordOptions
from dstrain.data.streaming import limits
from dstrain.data.streaming.blocks import read_blocks
from dstrain.data.streaming.limits import end_of_first
from dstrain.data.streaming.making import make_rows
from dstrain.data.streaming.prepare import prepare_stream, summarise
from dstrain.data.streaming.state import Place
from dstrain.data.streaming.stream import Held, Stream, StreamRequest
from tests.data.test_limit import KINDS, TEXTS, write
from tests.data.test_stream_making import contents, of_epochs

STREAMED = [kind for kind in KINDS if "tokens" not in kind and "nanoGPT" not in kind]


def request_of(path, kind="", **others):
    records = RecordOptions("messages" if "conversations" in kind else "auto")
    options = {"window": 7, "characters": 3000, "records": records} | others
    return StreamRequest(str(path), "bytes", 64, 3, **options)


def with_limit(request, limit):
    """The stream as another process is asked for it, and the bytes of what it reads."""
    end, size = end_of_first(Stream.open(request), limit)
    asked = json.loads(json.dumps(replace(request, end=end).to_json()))
    return Stream.open(StreamRequest.from_json(asked)), size


def texts_of_epoch(stream, epoch):
    blocks = takewhile(lambda block: block.place.epoch == epoch, read_blocks(stream, Place(epoch)))
    return [
        document.fields["messages"][0]["content"]
        if not isinstance(document, tuple)
        else "".join(piece.text for piece in document)
        for block in blocks
        for document in block.documents
    ]


@pytest.mark.parametrize("kind", STREAMED)
@pytest.mark.parametrize("limit", [1, 5, 12, 39, 40, 1000])
def test_the_first_documents_of_every_kind_of_file(tmp_path, kind, limit):
    request = request_of(write(kind, tmp_path), kind)
    stream, size = with_limit(request, limit)
    for epoch in (0, 1):
        assert sorted(texts_of_epoch(stream, epoch)) == sorted(TEXTS[:limit])
    whole = Stream.open(request)
    assert 0 < size <= whole.corpus.bytes
    assert stream.fingerprint != whole.fingerprint


def test_the_rows_go_on_from_a_state(tmp_path):
    stream, _ = with_limit(request_of(write("parquet", tmp_path)), 23)
    made = of_epochs(stream, 3)
    expected = contents(made)
    for one in made:
        found = contents(islice(make_rows(stream, one.state), 2))
        assert all(expected[row] == content for row, content in found.items() if row in expected)


def test_row_groups_are_counted_without_reading_them(tmp_path, monkeypatch):
    stream = Stream.open(request_of(write("parquet", tmp_path)))
    read = []
    monkeypatch.setattr(limits, "read_shard", lambda stream, shard: read.append(shard) or READ(stream, shard))
    assert end_of_first(stream, 12)[0] == (2, 2)
    assert end_of_first(stream, 15)[0] == (2, 5)
    assert read == [2, 2]


READ = limits.read_shard


def test_the_plan_knows_how_many_documents_there_are(tmp_path):
    lines = [json.dumps({"text": f"{number} " + "word " * 200}) for number in range(4000)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    request = request_of(tmp_path / "a.jsonl")
    whole, found = summarise(request, 0, 0), summarise(request, 0, 0, 2000)
    assert found["documents"] == 2000 == pytest.approx(whole["documents"] / 2, rel=0.01)
    assert found["train_rows"] == pytest.approx(whole["train_rows"] / 2, rel=0.01)
    assert found["limit_until"] == (0, 2000) and whole["limit_until"] is None
    few = summarise(request, 0, 0, 3)
    assert (few["documents"], few["tokens"]) == (3, 3 * 1003)


def test_what_is_held_back_is_of_the_first_documents(tmp_path):
    request = request_of(write("folder", tmp_path))
    found = summarise(request, 0.5, 100, 20)
    end, held = tuple(found["limit_until"]), found["held_until"]
    asked = replace(request, end=end, held=Held(0.5, *held))
    prepared = prepare_stream(asked, 100, found["fingerprint"], "data", "start a new run")
    stream = Stream.open(asked)
    trained = texts_of_epoch(stream, 0)
    assert 0 < found["validation_documents"] == 20 - len(trained)
    assert set(trained) < set(TEXTS[:20])
    kept = "".join(chr(token) for token in prepared.validation.rows([0]).input_ids[0] if token < 256)
    assert not any(text in kept for text in (*trained, *TEXTS[20:]))


def test_a_stream_that_was_begun_before_there_were_limits_is_the_same(tmp_path):
    request = request_of(write("jsonl", tmp_path))
    asked = request.to_json()
    del asked["end"]
    assert StreamRequest.from_json(asked) == request
    assert Stream.open(request).fingerprint == "4086e9977b7718e3f809b44bf5b6ca08"
