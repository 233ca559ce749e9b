"""The rows of a stream, for any documents: what they hold, in which order, and from which state they are made again."""

import json
from itertools import islice, takewhile
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dstrain.data.chat.options import RecordOptions
from dstrain.data.rows.packing import IGNORED, PackedRows, TokenStream
from dstrain.data.streaming.blocks import read_blocks, read_shard, shard_order
from dstrain.data.streaming.making import make_rows
from dstrain.data.streaming.segments import Segment, write_segment
from dstrain.data.streaming.state import Place, StreamState
from dstrain.data.streaming.stream import Stream, StreamRequest, check_fingerprint
from dstrain.data.tokenizing import encoders
from dstrain.errors import DstrainError

END = 256
corpora = st.lists(st.lists(st.text("ab ", max_size=30), max_size=8), min_size=1, max_size=5)
sizes = st.tuples(st.integers(1, 6), st.integers(1, 400))  # window and characters
some = settings(max_examples=12)


def write_corpus(folder, shards, *, fields=lambda text: {"text": text}):
    """A file for each shard, with documents that all differ; the first shard has one more."""
    folder = Path(folder)
    texts = []
    for shard, documents in enumerate(shards):
        named = [f"{shard}.{number} {text}" for number, text in enumerate(documents)]
        if shard == 0:
            named.append("0.x")
        lines = "".join(json.dumps(fields(text)) + "\n" for text in named)
        (folder / f"{shard:03}.jsonl").write_text(lines or "\n")
        texts += named
    return texts


def answered(text):
    return {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": text}]}


def stream_of(folder, *, seq_len=16, seed=3, sizes=(4, 100), **others):
    request = StreamRequest(
        str(folder), "bytes", seq_len, seed, window=sizes[0], characters=sizes[1], **others
    )
    return Stream.open(request)


def of_epochs(stream, epochs, state=None):
    """All rows that hold a token of the first epochs, and maybe more."""
    made = make_rows(stream, state or StreamState())
    return list(takewhile(lambda one: one.state.place.epoch < epochs, made))


def contents(made):
    """The three arrays of each row, by its number."""
    found = {}
    for one in made:
        batch = one.rows.rows(one.order)
        for at in range(one.order.size):
            found[one.state.first + at] = tuple(part[at].tobytes() for part in batch)
    return found


def documents_in(tokens):
    """The texts before each end of a document, and what is left behind the last one."""
    *texts, rest = np.split(tokens, np.flatnonzero(tokens == END) + 1)
    return [bytes(text[:-1].astype(np.uint8)).decode() for text in texts], rest


def unshuffled(made):
    """The rows of running text as they were cut."""
    return [one.rows.rows(np.arange(one.order.size)) for one in made]


@some
@given(corpora, sizes, st.integers(1, 40), st.integers(0, 2**64))
def test_every_document_once_an_epoch_and_rows_as_of_a_cached_text(shards, sizes, seq_len, seed):
    with TemporaryDirectory() as folder:
        texts = write_corpus(folder, shards)
        stream = stream_of(folder, seq_len=seq_len, seed=seed, sizes=sizes)
        made = of_epochs(stream, 3)
    cut = unshuffled(made)
    tokens = np.concatenate([batch.input_ids.ravel() for batch in cut])
    found, rest = documents_in(tokens)
    for epoch in range(3):
        part = found[epoch * len(texts) : (epoch + 1) * len(texts)]
        assert sorted(part) == sorted(texts)
    lengths = np.array([*(len(text) + 1 for text in found), *([rest.size] if rest.size else [])], np.int64)
    expected = PackedRows(TokenStream(tokens, np.cumsum(lengths) - lengths, lengths), seq_len)
    expected = expected.rows(np.arange(len(expected)))
    for name in ("input_ids", "position_ids"):
        assert np.array_equal(
            np.concatenate([getattr(batch, name) for batch in cut]), getattr(expected, name)
        )
    labels = np.concatenate([batch.labels for batch in cut])
    assert np.array_equal(labels.ravel()[:-1], expected.labels.ravel()[:-1]), (
        "but for the last, where the text is cut"
    )


@some
@given(corpora, sizes, st.integers(1, 40), st.data())
def test_going_on_from_a_state_repeats_the_rows(shards, sizes, seq_len, data):
    with TemporaryDirectory() as folder:
        write_corpus(folder, shards)
        stream = stream_of(folder, seq_len=seq_len, sizes=sizes)
        made = of_epochs(stream, 3)
        begin = data.draw(st.sampled_from(made))
        for state in (begin.state, begin.after):
            again = make_rows(stream, StreamState.from_json(json.loads(json.dumps(state.to_json()))))
            following = contents(islice(again, 4))
            assert min(following) == state.first
            expected = contents(made)
            assert all(expected[row] == content for row, content in following.items() if row in expected)


@settings(max_examples=10)
@given(st.lists(st.integers(1, 500), min_size=1, max_size=4), sizes, st.integers(2, 40), st.data())
def test_a_long_text_in_parts_is_one_document(lengths, sizes, seq_len, data):
    """Its parts are in blocks of their own, and no label is lost between them."""
    rng = np.random.default_rng(7)
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoders, "_PIECE", 16)
        for number, length in enumerate(lengths):
            text = bytes(rng.integers(97, 123, length).astype(np.uint8)).decode()
            (Path(folder) / f"{number}.txt").write_text(text)
        stream = stream_of(folder, seq_len=seq_len, sizes=sizes)
        made = of_epochs(stream, 2)
        cut = unshuffled(made)
        state = data.draw(st.sampled_from(made)).state
        again = contents(islice(make_rows(stream, state), 3))
    expected = contents(made)
    assert all(expected[row] == content for row, content in again.items() if row in expected)
    tokens = np.concatenate([batch.input_ids.ravel() for batch in cut])
    labels = np.concatenate([batch.labels.ravel() for batch in cut])
    found, _ = documents_in(tokens)
    assert sorted(map(len, found[: len(lengths)])) == sorted(lengths)[: len(found)] or len(found) < len(
        lengths
    )
    following = np.where(tokens[:-1] == END, IGNORED, tokens[1:])
    assert np.array_equal(labels[:-1], following)


@some
@given(corpora, sizes, st.integers(0, 2**64), st.booleans())
def test_conversations_are_whole_and_once_an_epoch(shards, sizes, seed, pack):
    with TemporaryDirectory() as folder:
        texts = write_corpus(folder, shards, fields=answered)
        records = RecordOptions(data_format="messages")
        stream = stream_of(folder, seq_len=80, seed=seed, sizes=sizes, pack=pack, records=records)
        made = of_epochs(stream, 2)
        again = contents(islice(make_rows(stream, made[-1].state), 1))
    answers = []
    for one in made:
        batch = one.rows.rows(one.order)
        assert ((batch.labels != IGNORED).sum(axis=1) == one.rows.label_tokens(one.order)).all()
        for labels, positions in zip(batch.labels, batch.position_ids, strict=True):
            assert pack or (positions == np.arange(80)).all()
            said, rest = documents_in(labels[labels != IGNORED])
            assert not rest.size
            answers += said
    assert sorted(answers[: len(texts)]) == sorted(answers[len(texts) :]) == sorted(texts)
    expected = contents(made)
    assert all(expected[row] == content for row, content in again.items())


@some
@given(corpora, sizes, st.integers(2, 40))
def test_a_document_a_row(shards, sizes, seq_len):
    with TemporaryDirectory() as folder:
        texts = write_corpus(folder, shards)
        stream = stream_of(folder, seq_len=seq_len, sizes=sizes, pack=False)
        made = list(takewhile(lambda one: one.state.place.epoch < 1, make_rows(stream, StreamState())))
    labels = []
    for one in made:
        batch = one.rows.rows(np.arange(one.order.size))
        assert (batch.position_ids == np.arange(seq_len)).all()
        labels.append(batch.labels[batch.labels != IGNORED])
    assert sum(map(len, labels)) == sum(map(len, texts)), (
        "each token but the first of a document, and its end"
    )


def test_row_groups_of_parquet_are_shards(tmp_path):
    texts = [f"{number} " + "x" * (number % 5) for number in range(60)]
    for file, first in (("a", 0), ("b", 40)):
        table = pa.table({"text": texts[first : first + (40 if file == "a" else 20)]})
        pq.write_table(table, tmp_path / f"{file}.parquet", row_group_size=10)
    stream = stream_of(tmp_path, seq_len=8, sizes=(7, 1000))
    assert [shard.name for shard in stream.shards] == [
        *(f"a.parquet#{group}" for group in range(4)),
        *(f"b.parquet#{group}" for group in range(2)),
    ]
    made = of_epochs(stream, 2)
    found, _ = documents_in(np.concatenate([batch.input_ids.ravel() for batch in unshuffled(made)]))
    for epoch in (found[:60], found[60:120]):
        assert sorted(epoch) == sorted(texts)
    expected = contents(made)
    for state in (made[3].state, made[-3].state):
        again = contents(islice(make_rows(stream, state), 2))
        assert all(expected[row] == content for row, content in again.items() if row in expected)


@pytest.mark.parametrize(
    "name,write", [("a.jsonl", "\n\n".join), ("b.json", lambda lines: f"[{','.join(lines)}]")]
)
def test_going_on_in_the_middle_of_a_file_reads_what_is_left_of_it(tmp_path, name, write):
    (tmp_path / name).write_text(write([json.dumps({"text": f"text {number}"}) for number in range(9)]))
    stream = stream_of(tmp_path / name)
    whole = list(read_shard(stream, 0))
    assert [one.record for one in whole] == list(range(9))
    for first in (1, 5, 9):
        rest = list(read_shard(stream, 0, first))
        assert [(one.record, one.document[0].text) for one in rest] == [
            (one.record, one.document[0].text) for one in whole[first:]
        ]


def test_the_order_is_a_function_of_the_seed(tmp_path):
    write_corpus(tmp_path, [["a"] * 30] * 8)
    orders = []
    for seed in (1, 1, 2):
        stream = stream_of(tmp_path, seed=seed, sizes=(16, 10_000))
        assert shard_order(stream, 0).tolist() != shard_order(stream, 1).tolist()
        tokens = np.concatenate([batch.input_ids.ravel() for batch in unshuffled(of_epochs(stream, 2))])
        orders.append(documents_in(tokens)[0])
    first, same, other = orders
    assert first == same != other
    half = len(first) // 2
    assert first[:half] != first[half : 2 * half]


def test_rows_that_must_never_change(tmp_path):
    """The order is part of every run that was begun with it."""
    write_corpus(tmp_path, [["one", "two", "three"], ["four", "five"], ["six"]])
    stream = stream_of(tmp_path, seq_len=8, seed=42, sizes=(3, 1000))
    batches = [one.rows.rows(one.order) for one in islice(make_rows(stream, StreamState()), 2)]
    tokens = np.concatenate([batch.input_ids for batch in batches])
    assert ["".join(chr(token) if token < END else "|" for token in row) for row in tokens] == GOLDEN


GOLDEN = ["|1.0 fou", "1.1 five", "r|2.0 si", "e|0.2 th", "x|0.1 tw", "o|0.0 on"]


def test_rows_of_a_file_are_those_that_were_made(tmp_path):
    write_corpus(tmp_path, [["some text", "more"], ["a", ""]])
    for seq_len, pack in ((1, True), (7, True), (16, True), (16, False)):
        stream = stream_of(tmp_path, seq_len=seq_len, pack=pack)
        made = next(make_rows(stream, StreamState()))
        path = tmp_path / f"segment-{seq_len}-{pack}"
        check = write_segment(path, made, np.dtype(np.uint16))
        segment = Segment.open(path)
        path.unlink()
        for expected, found in zip(
            made.rows.rows(made.order), segment.rows(np.arange(made.order.size)), strict=True
        ):
            assert np.array_equal(expected, found) and found.dtype == np.int64
        assert segment.label_tokens.tolist() == made.rows.label_tokens(made.order).tolist()
        assert segment.filled.tolist() == made.rows.filled(made.order).tolist()
        assert (segment.first, segment.end) == (0, made.order.size)
        assert segment.state.check == check


def test_blocks_end_at_their_window_and_their_characters(tmp_path):
    write_corpus(tmp_path, [["a" * 40] * 10, ["b" * 400] * 2])
    stream = stream_of(tmp_path, sizes=(3, 1000))
    sizes = [
        len(block.documents)
        for block in takewhile(lambda one: one.place.epoch < 1, read_blocks(stream, Place()))
    ]
    assert max(sizes) == 3 and sum(sizes) == 13
    assert len(sizes) == 5
    narrow = stream_of(tmp_path, sizes=(100, 500))
    for block in islice(read_blocks(narrow, Place()), 8):
        assert sum(len(piece.text) for document in block.documents for piece in document) < 1000


def refusal_of(stream, count=50):
    with pytest.raises(DstrainError) as refused:
        list(islice(make_rows(stream, StreamState()), count))
    return refused.value


def test_what_is_wrong_has_its_place(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' * 5 + "{no\n")
    assert refusal_of(stream_of(tmp_path)).where == f"{tmp_path}/a.jsonl:6"


def test_a_source_without_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n' * 5)
    assert "no row can be made" in refusal_of(stream_of(tmp_path)).message
    (tmp_path / "a.jsonl").write_text("\n \n")
    assert "no document" in refusal_of(stream_of(tmp_path)).message


def test_conversations_that_are_too_long(tmp_path):
    lines = [json.dumps(answered("a" * size)) for size in (5, 90, 7)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))

    def stream(too_long):
        records = RecordOptions("messages", too_long=too_long)
        return stream_of(tmp_path, seq_len=60, sizes=(9, 10_000), records=records)

    refused = refusal_of(stream("error"))
    assert refused.where == f"{tmp_path}/a.jsonl:2" and "more than seq_len = 60" in refused.message
    filled = {"drop": 2, "cut": 3}
    for too_long, documents in filled.items():
        made = next(make_rows(stream(too_long), StreamState()))
        batch = made.rows.rows(made.order)
        assert (batch.position_ids == 0).sum() == documents


def test_a_bad_record_is_an_error_or_left_out_and_named(tmp_path, capfd):
    lines = [json.dumps(one) for one in (answered("a"), {"messages": []}, answered("b"))]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    refused = refusal_of(stream_of(tmp_path, seq_len=80, records=RecordOptions("messages")))
    assert refused.where == f"{tmp_path}/a.jsonl:2" and "on_bad_record: skip" in refused.hint
    records = RecordOptions("messages", on_bad_record="skip")
    stream = stream_of(tmp_path, seq_len=80, sizes=(9, 10_000), records=records)
    made = next(make_rows(stream, StreamState()))
    assert (made.rows.rows(made.order).position_ids == 0).sum() == 2
    assert f"left out: {tmp_path}/a.jsonl:2: " in capfd.readouterr().err


def test_a_record_without_its_text_is_too(tmp_path, capfd):
    lines = [json.dumps({"text": text}) for text in ("a" * 30, None, "b" * 30)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    refused = refusal_of(stream_of(tmp_path))
    assert refused.where == f"{tmp_path}/a.jsonl:2" and "on_bad_record: skip" in refused.hint
    stream = stream_of(tmp_path, sizes=(9, 10_000), records=RecordOptions(on_bad_record="skip"))
    made = next(make_rows(stream, StreamState()))
    assert set(made.rows.rows(made.order).input_ids.ravel().tolist()) <= {ord("a"), ord("b"), 256}
    assert f"left out: {tmp_path}/a.jsonl:2: the field 'text' holds null" in capfd.readouterr().err


def test_records_of_tokens_are_not_streamed(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"input_ids": [1, 2, 256]}')
    with pytest.raises(DstrainError, match="nothing to tokenize"):
        stream_of(tmp_path)


def test_a_file_that_changes_is_an_error(tmp_path):
    write_corpus(tmp_path, [["a"] * 5, ["b"] * 5])
    stream = stream_of(tmp_path, sizes=(1, 100))
    made = make_rows(stream, StreamState())
    next(made)
    for name in ("000.jsonl", "001.jsonl"):
        (tmp_path / name).write_text('{"text": "other"}\n')
    with pytest.raises(DstrainError, match="has changed"):
        list(islice(made, 50))
    with pytest.raises(DstrainError, match="not those that the stream was made for"):
        check_fingerprint(stream_of(tmp_path, sizes=(1, 100)), stream.fingerprint)


def test_the_fingerprint_knows_what_decides_the_rows(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write_corpus(tmp_path / folder, [["a"] * 5, ["b"] * 5])
    plain = stream_of(tmp_path / "one").fingerprint
    assert plain == stream_of(tmp_path / "two").fingerprint, "where the files lie is no part of it"
    others = [{"seq_len": 17}, {"seed": 4}, {"sizes": (5, 100)}, {"sizes": (4, 101)}, {"pack": False}]
    assert len({plain, *(stream_of(tmp_path / "one", **other).fingerprint for other in others)}) == 6
    (tmp_path / "two" / "001.jsonl").rename(tmp_path / "two" / "002.jsonl")
    assert stream_of(tmp_path / "two").fingerprint != plain


def test_a_request_survives_json(tmp_path):
    records = RecordOptions("messages", {"messages": "turns"}, train_on="last")
    request = StreamRequest(str(tmp_path), "bytes", 8, 3, pack=False, records=records)
    assert StreamRequest.from_json(json.loads(json.dumps(request.to_json()))) == request


@pytest.mark.parametrize(
    "change",
    [{"row": -1}, {"epoch": "1"}, {"first": 9}, {"check": 3}, {"more": 1}, {"block": True}, {"skip": 1.0}],
)
def test_what_is_no_state(change):
    with pytest.raises(DstrainError, match="no state of a stream"):
        StreamState.from_json({**StreamState().to_json(), **change})
