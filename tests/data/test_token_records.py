"""Records that are tokenized already: what they train is what texts and conversations of the same tokens train."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest

from dstrain.data.chat.options import RecordOptions
from dstrain.data.prepare import prepare
from dstrain.data.rows.packing import IGNORED, PackedRows
from dstrain.data.rows.whole_documents import WholeDocumentRows
from dstrain.data.tokenizing.tokenizers import ByteTokenizer
from dstrain.errors import DstrainError
from tests.support.table_files import arrow_stream, parquet

END = 256


def write(path, records):
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


def prepared(tmp_path, source, seq_len=32, pack=True, validation=0.0, **options):
    return prepare(
        str(source), "bytes", seq_len, validation, tmp_path / "cache", pack, records=RecordOptions(**options)
    )


def tokens(text):
    return [int(token) for token in ByteTokenizer().encode(text)]


TEXTS = [f"document number {number} of some" for number in range(20)]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "arrow"])
@pytest.mark.parametrize("pack", [True, False])
def test_documents_without_labels_are_those_of_the_same_texts(tmp_path, suffix, pack):
    texts = prepared(tmp_path, write(tmp_path / "t.jsonl", [{"text": text} for text in TEXTS]), pack=pack)
    records = [{"input_ids": [*tokens(text), END]} for text in TEXTS]
    path = tmp_path / f"a.{suffix}"
    {"jsonl": lambda: write(path, records), "parquet": lambda: parquet(*records)(path)}.get(
        suffix, lambda: arrow_stream(*records)(path)
    )()
    data = prepared(tmp_path, path, pack=pack)
    assert data.fingerprint == texts.fingerprint
    summary = data.summary()
    assert (summary["format"], summary["ends_with"], summary["trained_tokens"]) == (
        "tokens",
        "<|endoftext|>",
        None,
    )
    assert isinstance(data.train, PackedRows) == pack


def test_nothing_is_put_around_a_document(tmp_path):
    data = prepared(tmp_path, write(tmp_path / "a.jsonl", [{"input_ids": tokens("abcd")}] * 16), seq_len=8)
    assert data.tokens == 64 and data.summary()["ends_with"] == ""
    batch = data.train.rows(np.array([0]))
    assert bytes(batch.input_ids[0].tolist()) == b"abcdabcd"
    assert batch.labels[0].tolist() == [*b"bcd", IGNORED, *b"bcd", IGNORED]


def test_labels_say_what_is_trained_and_documents_stay_whole(tmp_path):
    """As the same conversations are trained."""
    chat = [
        {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n}"}]}
        for n in range(30)
    ]
    conversations = prepared(tmp_path, write(tmp_path / "c.jsonl", chat))
    records = []
    for row in range(len(conversations.train)):
        batch = conversations.train.rows(np.array([row]))
        ids, positions, labels = (part[0] for part in batch)
        size = int(conversations.train.filled(np.array([row]))[0])
        own = np.concatenate([[IGNORED], labels[:-1]])
        starts = [*np.flatnonzero(positions[:size] == 0).tolist(), size]
        for first, end in pairwise(starts):
            records.append({"input_ids": ids[first:end].tolist(), "labels": own[first:end].tolist()})
    padded = [
        {
            "input_ids": [*one["input_ids"], 0, 0],
            "labels": [*one["labels"], -100, -100],
            "attention_mask": [1] * len(one["input_ids"]) + [0, 0],
        }
        for one in records
    ]
    plain, cut = (
        prepared(tmp_path, write(tmp_path / f"{name}.jsonl", rows))
        for name, rows in (("p", records), ("m", padded))
    )
    assert isinstance(plain.train, WholeDocumentRows)
    assert plain.fingerprint == cut.fingerprint and plain.trained_tokens == conversations.trained_tokens
    rows = np.arange(len(plain.train))
    labels = [np.sort(data.train.rows(rows).labels.ravel()) for data in (plain, conversations)]
    assert (labels[0] == labels[1]).all()
    assert plain.summary()["trained_tokens"] == plain.trained_tokens > 0


def test_other_names_validation_and_empty_records(tmp_path):
    records = [{"ids": [*tokens(text), END], "labels": None} for text in TEXTS] + [{"ids": []}]
    source = write(tmp_path / "a.jsonl", records)
    data = prepared(tmp_path, source, data_fields={"input_ids": "ids"}, validation=0.2)
    assert (data.documents, data.validation_documents, data.empty_documents) == (20, 4, 1)
    assert "there are no tokens" in (data.folder / "skipped.txt").read_text()


def test_bad_records_are_left_out_where_that_was_said(tmp_path):
    records = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}] * 9
    source = write(
        tmp_path / "a.jsonl",
        [*records, {"input_ids": [1, 999]}, {"messages": []}, {"input_ids": [1], "labels": [1]}],
    )
    data = prepared(tmp_path, source, seq_len=6, on_bad_record="skip")
    assert (data.documents, data.empty_documents) == (9, 3)
    listed = (data.folder / "skipped.txt").read_text().splitlines()
    assert [line.partition(": ")[0].rpartition(":")[2] for line in listed] == ["10", "11", "12"]
    with pytest.raises(DstrainError, match="all 2 records were left out"):
        prepared(tmp_path, write(tmp_path / "b.jsonl", [{"input_ids": [999]}] * 2), on_bad_record="skip")


def test_too_long_documents_with_labels(tmp_path):
    rows = [{"input_ids": list(range(n)), "labels": list(range(n))} for n in (4, 20)]
    source = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(DstrainError, match="1 of 2 documents have more than seq_len = 8 tokens"):
        prepared(tmp_path, source, seq_len=8)
    assert prepared(tmp_path, source, seq_len=8, too_long="drop").dropped_documents == 1
    assert prepared(tmp_path, source, seq_len=8, too_long="cut").cut_documents == 1
