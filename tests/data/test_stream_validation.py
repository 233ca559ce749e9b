"""What a stream holds back for validation: chosen by a hash from its beginning, and trained on nowhere."""

import json
from dataclasses import replace
from itertools import takewhile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dstrain.data.chat.options import RecordOptions
from dstrain.data.rows.packing import IGNORED
from dstrain.data.streaming.making import make_rows
from dstrain.data.streaming.state import StreamState
from dstrain.data.streaming.stream import Held, Stream, StreamRequest
from dstrain.data.streaming.validation import hold_back
from dstrain.data.tokenizing import encoders
from dstrain.errors import DstrainError
from tests.data.test_stream_making import answered, documents_in

SHARDS, DOCUMENTS = 5, 40


def corpus(folder, fields=lambda text: {"text": text}):
    texts = {}
    for shard in range(SHARDS):
        named = [f"{shard}.{n} " + "x" * (n % 9) for n in range(DOCUMENTS)]
        (folder / f"{shard}.jsonl").write_text("\n".join(json.dumps(fields(text)) for text in named))
        texts |= {(shard, n): text for n, text in enumerate(named)}
    return texts


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    return folder, corpus(folder)


def stream_of(folder, **choices):
    return Stream.open(
        StreamRequest(str(folder), "bytes", **{"seq_len": 32, "seed": 1, "window": 7, **choices})
    )


def labelled(rows):
    batch = rows.rows(np.arange(len(rows)))
    return documents_in(batch.labels[batch.labels != IGNORED])[0]


def trained_on(stream):
    made = takewhile(lambda one: one.state.place.epoch < 1, make_rows(stream, StreamState()))
    tokens = [one.rows.rows(np.arange(one.order.size)).input_ids.ravel() for one in made]
    return documents_in(np.concatenate(tokens))[0]


@settings(max_examples=10)
@given(st.floats(0.02, 0.6), st.integers(1, 30))
def test_all_documents_are_on_one_side(texts, fraction, samples):
    folder, all_texts = texts
    stream = stream_of(folder)
    try:
        found = hold_back(stream, fraction, samples)
    except DstrainError as error:
        assert "fill no row" in error.message
        return
    held = found.held
    chosen = [text for (shard, n), text in all_texts.items() if held.holds(f"{shard}.jsonl", shard, n)]
    assert len(chosen) == found.documents
    if (held.shard, held.record) == (SHARDS, 0):
        assert len(found.rows) <= samples
    else:
        assert len(found.rows) == samples, "no more are read than are needed"
    training = replace(stream, request=replace(stream.request, held=held))
    seen = trained_on(training)[: len(all_texts) - len(chosen)]
    assert sorted(seen + chosen) == sorted(all_texts.values())
    assert hold_back(stream, fraction, samples).held == held


def test_only_the_beginning_is_read(texts, tmp_path):
    folder, _ = texts
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "4.jsonl").write_text("{no\n")
    assert hold_back(stream_of(tmp_path), 0.3, 3).held == hold_back(stream_of(folder), 0.3, 3).held


def test_the_share_is_that_of_the_documents(texts):
    _, all_texts = texts
    for fraction in (0.1, 0.5):
        held = Held(fraction, SHARDS, 0)
        chosen = sum(held.holds(f"{shard}.jsonl", shard, n) for shard, n in all_texts)
        assert abs(chosen / len(all_texts) - fraction) < 0.08


@pytest.mark.parametrize("pack", [True, False])
def test_conversations(tmp_path, pack):
    texts = corpus(tmp_path, answered)
    stream = stream_of(tmp_path, seq_len=90, pack=pack, records=RecordOptions("messages"))
    found = hold_back(stream, 0.2, 4)
    assert len(found.rows) >= 4 and found.stop_tokens == (256,)
    held = found.held
    chosen = [text for (shard, n), text in texts.items() if held.holds(f"{shard}.jsonl", shard, n)]
    assert sorted(labelled(found.rows)) == sorted(chosen)


def test_a_document_a_row(texts):
    folder, _ = texts
    found = hold_back(stream_of(folder, pack=False), 0.3, 6)
    assert len(found.rows) == 6 == found.documents


def test_a_long_text_is_held_back_as_far_as_it_is_needed(tmp_path, monkeypatch):
    monkeypatch.setattr(encoders, "_PIECE", 16)
    (tmp_path / "a.txt").write_text("ab" * 500)
    (tmp_path / "b.txt").write_text("cd" * 500)
    stream = stream_of(tmp_path, characters=50)
    found = hold_back(stream, 0.999, 5)
    assert len(found.rows) >= 5 and found.documents == 1
    assert found.rows.rows(np.arange(5)).labels.min() >= 0, "it is one document"
    assert found.held == Held(0.999, 0, 1)
    with pytest.raises(DstrainError, match="no document is left to train on"):
        next(make_rows(stream_of(tmp_path, held=Held(0.9999999, 2, 0)), StreamState()))


def test_too_few(texts):
    folder, _ = texts
    with pytest.raises(DstrainError, match="fill no row of 5,000") as refused:
        hold_back(stream_of(folder, seq_len=5000), 0.02, 3)
    assert "validation" in refused.value.hint
