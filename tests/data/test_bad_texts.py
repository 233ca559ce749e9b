"""Records of texts that hold none: an error with the way out, or left out and counted as bad conversations are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dstrain.data.chat.corpus import source_of
from dstrain.data.chat.options import RecordOptions
from dstrain.data.listing.sources import find_files
from dstrain.data.prepare import PackedData, main, prepare
from dstrain.data.tokenizing.tokenizers import ByteTokenizer
from dstrain.errors import DstrainError
from tests.support.table_files import arrow_stream, parquet

GOOD = [{"text": f"text number {number}"} for number in range(20)]
ROWS = [*GOOD[:7], {"text": None}, *GOOD[7:]]


def prepared(place: Path, source: Path, limit: int | None = None, **options: str) -> PackedData:
    records = RecordOptions(**options)
    return prepare(str(source), "bytes", 16, 0.0, place / "cache", records=records, limit=limit)


@pytest.fixture
def clean(tmp_path: Path) -> PackedData:
    (tmp_path / "clean.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in GOOD))
    return prepared(tmp_path, tmp_path / "clean.jsonl")


LINES = [
    *map(json.dumps, GOOD[:7]),
    '{"text": ',
    '{"body": "a"}',
    "[]",
    '{"text": 5}',
    *map(json.dumps, GOOD[7:]),
]
FILES = {
    "a.parquet": (parquet(*ROWS), [": row group 1, row 8: the field 'text' holds null, not a string"]),
    "a.arrow": (arrow_stream(*ROWS), [": batch 1, row 8: the field 'text' holds null, not a string"]),
    "a.jsonl": (
        lambda path: path.write_text("\n".join(LINES)),
        [
            ":8: this line is not JSON",
            ":9: this line has no field 'text'",
            ":10: this line holds",
            ":11: the field 'text' holds a number",
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_they_are_left_out_where_that_was_said(tmp_path: Path, clean: PackedData, name: str) -> None:
    write, reasons = FILES[name]
    path = tmp_path / name
    write(path)
    data = prepared(tmp_path, path, on_bad_record="skip")
    assert data.fingerprint == clean.fingerprint
    assert (data.documents, data.empty_documents) == (20, len(reasons))
    skipped = (data.folder / "skipped.txt").read_text().splitlines()
    assert len(skipped) == len(reasons)
    for line, reason in zip(skipped, reasons, strict=True):
        assert line.startswith(f"{path}{reason}"), line
    with pytest.raises(DstrainError) as refused:  # the cache of what was left out is another one
        prepared(tmp_path, path)
    assert refused.value.where == f"{path}{reasons[0].split(': this')[0].split(': the')[0]}"
    assert "on_bad_record: skip" in str(refused.value.hint)


def test_they_count_in_a_limit_as_conversations_do(tmp_path: Path) -> None:
    parquet(*ROWS)(tmp_path / "a.parquet")
    data = prepared(tmp_path, tmp_path / "a.parquet", limit=9, on_bad_record="skip")
    assert (data.documents, data.empty_documents) == (8, 1)


def test_all_of_them_are_too_many(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": ""}\n')
    with pytest.raises(DstrainError, match="all 2 records were left out, or are empty") as refused:
        prepared(tmp_path, tmp_path / "a.jsonl", on_bad_record="skip", data_format="text")
    assert f"the first: {tmp_path}/a.jsonl:1: " in refused.value.message
    assert refused.value.where == str(tmp_path / "a.jsonl")


def test_where_nothing_can_be_bad_the_cache_is_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a text of some length")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    skips = RecordOptions(on_bad_record="skip")
    for name, same in (("a.txt", True), ("a.jsonl", False)):
        found = find_files(str(tmp_path / name))
        states = [source_of(found, options, ByteTokenizer()).state for options in (RecordOptions(), skips)]
        assert (states[0] == states[1]) is same
        assert states[0] == found.state, "the key of the caches that are there"


def test_a_cache_in_which_none_was_bad_serves(tmp_path: Path, clean: PackedData) -> None:
    assert prepared(tmp_path, tmp_path / "clean.jsonl", on_bad_record="skip").folder == clean.folder


def test_the_summary_is_found_again(tmp_path: Path) -> None:
    from dstrain.data.dataset_summary_cache import read_summary, summary_file, tokenizer_state

    parquet(*ROWS)(tmp_path / "a.parquet")
    request = {
        "source": str(tmp_path / "a.parquet"), "tokenizer": "bytes", "cache_dir": str(tmp_path / "cache"),
        "seq_len": 16, "validation": 0.0, "pack": True, "begin": "auto", "records": {"on_bad_record": "skip"},
    }  # fmt: skip
    (tmp_path / "request.json").write_text(json.dumps(request))
    assert main([str(tmp_path / "request.json"), str(tmp_path / "out.json")]) == 0
    choices = {key: request[key] for key in ("seq_len", "validation", "pack", "begin")}
    kept = summary_file(
        tmp_path / "cache",
        find_files(str(tmp_path / "a.parquet")),
        tokenizer_state("bytes"),
        **choices,
        records=RecordOptions(on_bad_record="skip").state,
    )
    assert read_summary(kept) == json.loads((tmp_path / "out.json").read_text())
