"""Tables: parquet, Arrow and comma-separated values give the records that JSON lines give, from any kind of file."""

from __future__ import annotations

import csv
import json
import tracemalloc

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from dstrain.data.chat.formats import read_record
from dstrain.data.chat.options import RecordOptions
from dstrain.data.listing.sources import find_files
from dstrain.data.prepare import prepare
from dstrain.data.reading import tables
from dstrain.data.reading.documents import read_documents, read_records
from dstrain.errors import DstrainError
from tests.support.table_files import saved

TEXTS = [{"text": f"text {number} \u00e4\n", "id": number} for number in range(30)]
MESSAGES = [
    {"messages": [{"role": "user", "content": f"is {n} a number?"}, {"role": "assistant", "content": "yes"}]}
    for n in range(30)
]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"n": 1}}}
CALLS = [
    {
        "messages": [
            {"role": "user", "content": f"is {n} a number?"},
            {"role": "assistant", "content": "", "tool_calls": [CALL], "reasoning_content": "hm"},
            {"role": "tool", "content": "1"},
            {"role": "assistant", "content": "yes", "weight": 1},
        ],
        "tools": [{"type": "function", "function": {"name": "f"}}],
    }
    for n in range(9)
]
SHAREGPT = [
    {"conversations": [{"from": "human", "value": f"is {n} a number?"}, {"from": "gpt", "value": "yes"}]}
    for n in range(30)
]
ALPACA = [{"instruction": f"say {n}", "input": "", "output": f"{n}"} for n in range(30)]
PROMPTS = [{"prompt": f"{n} + {n} = ", "completion": f"{n + n}"} for n in range(30)]
RECORDS = {"text": TEXTS, "messages": MESSAGES, "sharegpt": SHAREGPT, "alpaca": ALPACA, "prompts": PROMPTS}


def write(path, records):
    """The records in a file of the kind that its suffix says."""
    table = pa.Table.from_pylist(records)
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=7)
    elif path.suffix == ".arrow":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table, max_chunksize=7)
    elif path.suffix == ".feather":
        pyarrow.feather.write_feather(table, str(path), chunksize=7)
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            rows.writerow(records[0])
            for record in records:
                rows.writerow([x if isinstance(x, str) else json.dumps(x) for x in record.values()])
    else:
        path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


def prepared(tmp_path, source, seq_len=256, **options):
    return prepare(str(source), "bytes", seq_len, 0.0, tmp_path / "cache", records=RecordOptions(**options))


SUFFIXES = [".parquet", ".arrow", ".feather", ".csv", ".tsv"]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("records", RECORDS)
def test_every_format_comes_from_every_kind_of_file(tmp_path, records, suffix):
    wanted = prepared(tmp_path, write(tmp_path / "a.jsonl", RECORDS[records]))
    path = write(tmp_path / f"a{suffix}", RECORDS[records])
    assert prepared(tmp_path, path).fingerprint == wanted.fingerprint
    source = find_files(str(path))
    assert source.kinds.startswith(f"1 {suffix}{' as tables' if suffix in ('.csv', '.tsv') else ''} (")
    reads = [record.bytes_read for record in read_records(source)]
    assert reads == sorted(reads) and source.bytes - 16 <= reads[-1] <= source.bytes


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_tools_and_their_calls_come_from_every_kind_of_file(tmp_path, suffix):
    source = find_files(str(write(tmp_path / f"a{suffix}", CALLS)))
    read = [read_record(record.fields, "messages") for record in read_records(source)]
    assert read == [read_record(record, "messages") for record in CALLS]


@pytest.mark.parametrize(
    ("suffix", "place"),
    [
        (".parquet", ": row group 2, row 3"),
        (".arrow", ": batch 2, row 3"),
        (".feather", ": batch 2, row 3"),
        (".csv", ":11"),
        (".tsv", ":11"),
    ],
)
def test_a_bad_row_is_named_by_its_place(tmp_path, suffix, place):
    bad = [dict(record) for record in ALPACA]
    bad[9]["output"] = ""
    path = write(tmp_path / f"a{suffix}", bad)
    with pytest.raises(DstrainError, match="the assistant says nothing") as refused:
        prepared(tmp_path, path)
    assert refused.value.where == f"{path}{place}"
    assert prepared(tmp_path, path, on_bad_record="skip").documents == 29


def test_the_rows_of_a_part_are_counted_through(tmp_path, monkeypatch):
    """Whatever is read at once."""
    places = []
    for rows in (2, 5, 1000):
        monkeypatch.setattr("dstrain.data.reading.tables._PART_ROWS", rows)
        for suffix in (".parquet", ".feather"):
            source = find_files(str(write(tmp_path / f"a{suffix}", TEXTS)))
            places.append([record.where.partition(": ")[2].split()[-3:] for record in read_records(source)])
            assert [record.fields["text"] for record in read_records(source)] == [t["text"] for t in TEXTS]
    assert all(found == places[0] for found in places[::2]) and all(
        found == places[1] for found in places[1::2]
    )
    assert places[0][7:9] == [["2,", "row", "1"], ["2,", "row", "2"]]


def test_nested_columns_are_as_json_has_them(tmp_path):
    kind = pa.struct([("a", pa.string()), ("b", pa.list_(pa.struct([("c", pa.int8()), ("d", pa.string())])))])
    rows = [
        {"messages": {"a": "x", "b": [{"c": 1, "d": None}, None]}, "system": "s"},
        {"messages": {"a": None, "b": None}, "system": None},
        {"messages": None, "system": "t"},
    ]
    table = pa.Table.from_pylist(
        rows, pa.schema([("messages", kind), ("system", pa.dictionary(pa.int8(), pa.string()))])
    )
    table = table.append_column("tools", pa.array([[("k", 1)], [], None], pa.map_(pa.string(), pa.int64())))
    pq.write_table(table, tmp_path / "a.parquet")
    records = [dict(record.fields) for record in read_records(find_files(str(tmp_path / "a.parquet")))]
    assert records == [
        {"messages": {"a": "x", "b": [{"c": 1}, None]}, "system": "s", "tools": {"k": 1}},
        {"messages": {}, "system": None, "tools": {}},
        {"messages": None, "system": "t", "tools": None},
    ]


def test_columns_that_no_format_knows_cost_nothing(tmp_path):
    table = pa.table({"text": ["a", "b"], "picture": [b"x" * 1000] * 2})
    pq.write_table(table, tmp_path / "a.parquet")
    source = find_files(str(tmp_path / "a.parquet"))
    assert [dict(record.fields) for record in read_records(source)] == [
        {"text": "a", "picture": None},
        {"text": "b", "picture": None},
    ]


def test_memory_stays_flat(tmp_path):
    """One row group of 40 MB is read in parts: neither Python nor Arrow holds all of it."""
    text = "".join(f"{number} " for number in range(2500))
    table = pa.table({"text": [f"{number} {text}" for number in range(3500)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=3500, use_dictionary=False)
    del table
    source = find_files(str(tmp_path / "a.parquet"))
    pool = pa.default_memory_pool()
    before, most = pool.bytes_allocated(), 0
    tracemalloc.start()
    for count, document in enumerate(read_documents(source), start=1):
        assert document.text.startswith(f"{count - 1} 0 1 ")
        most = max(most, pool.bytes_allocated() - before)
    python = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 3500 and most < 20e6 and python < 12e6


def test_a_table_of_values_that_is_none_of_records_is_a_text(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("name,price\nbolt,1\n")
    assert [part.text for part in read_documents(find_files(str(path)))] == ["name,price\nbolt,1\n"]
    assert find_files(str(path)).kinds == "1 .csv as texts (18 bytes)"
    mapped = find_files(str(path), data_fields={"text": "name"})
    assert mapped.kinds == "1 .csv as tables (18 bytes)"
    assert [dict(record.fields) for record in read_records(mapped)] == [{"name": "bolt", "price": "1"}]


def test_cells_of_all_sorts(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'\xef\xbb\xbfid; text \r\n1;"a;b"\r\n\r\n2;"c\r\n""d"""\r\n3;\xc3\xa9\r\n4;\r\n')
    source = find_files(str(path))
    records = list(read_records(source))
    assert [record.fields["text"] for record in records] == ["a;b", 'c\r\n"d"', "\u00e9", ""]
    assert [record.where.rpartition(":")[2] for record in records] == ["2", "4", "6", "7"]
    assert records[-1].bytes_read == source.bytes


def test_a_folder_mixes_kinds_and_the_plan_names_them(tmp_path):
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    names = ["deep/e.parquet", "a.jsonl", "b.arrow", "c.csv", "d.tsv", "f.jsonl.gz"]
    for name in names[:-1]:
        write(folder / name, [{"text": name}])
    (folder / "note.txt").write_text("note.txt")
    source = find_files(str(folder))
    assert [part.text for part in read_documents(source)] == [
        "a.jsonl", "b.arrow", "c.csv", "d.tsv", "deep/e.parquet", "note.txt"
    ]  # fmt: skip
    for kind in (".parquet", ".arrow", ".jsonl", ".txt", ".csv as tables", ".tsv as tables"):
        assert f"1 {kind} (" in source.kinds


def test_of_a_complete_cache_no_table_is_opened_but_the_first(tmp_path, monkeypatch):
    folder = tmp_path / "tables"
    folder.mkdir()
    for number in range(9):
        write(folder / f"{number}.parquet", TEXTS)
    opened = []
    check, parts = tables._check_begin_and_end, tables._parquet_parts
    monkeypatch.setattr(
        tables, "_check_begin_and_end", lambda file: (opened.append(file.relative), check(file))
    )
    monkeypatch.setattr(
        tables, "_parquet_parts", lambda file, *only: (opened.append(file.relative), parts(file, *only))[1]
    )
    first = prepared(tmp_path, folder)
    assert set(opened) == {f"{number}.parquet" for number in range(9)}, (
        "all are checked before their tokens are made"
    )
    opened.clear()
    assert prepared(tmp_path, folder).fingerprint == first.fingerprint
    assert set(opened) == {"0.parquet"}


def test_a_pattern_names_files(tmp_path, monkeypatch):
    for name in ("b.parquet", "a.jsonl", "deep/c.parquet", "deep/deeper/d.parquet"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name, [{"text": name}])
    (tmp_path / "deep" / "loop").symlink_to(tmp_path)

    def found(pattern):
        return [part.text for part in read_documents(find_files(pattern))]

    everywhere = ["b.parquet", "deep/c.parquet", "deep/deeper/d.parquet"]
    assert found(f"{tmp_path}/**/*.parquet") == everywhere
    assert found(f"{tmp_path}/*.parquet") == ["b.parquet"]
    assert found(f"{tmp_path}/[ab].*") == ["a.jsonl", "b.parquet"]
    monkeypatch.chdir(tmp_path)
    assert found("**/*.parquet") == everywhere and found("deep/?.parquet") == ["deep/c.parquet"]
    assert find_files("*.*").kinds.startswith("1 .parquet (") and "1 .jsonl (" in find_files("*.*").kinds
    (tmp_path / "x[1].txt").write_text("a file of such a name")
    assert found("x[1].txt") == ["a file of such a name"]


def test_files_that_change_are_seen_in_the_cache_key(tmp_path):
    path = write(tmp_path / "a.parquet", TEXTS)
    first = prepared(tmp_path, f"{tmp_path}/*.parquet")
    assert prepared(tmp_path, f"{tmp_path}/*.parquet").folder == first.folder
    write(tmp_path / "b.parquet", TEXTS)
    assert prepared(tmp_path, f"{tmp_path}/*.parquet").documents == 60
    write(path, [{"text": "another text " * 30}])
    assert prepared(tmp_path, path).documents == 1


def test_a_folder_that_datasets_has_saved(tmp_path):
    saved([{"text": f"train {n}"} for n in range(5)], shards=2)(tmp_path / "one")
    saved({"train": [{"text": "in train"}], "test": [{"text": "in test"}]})(tmp_path / "several")
    saved({"only": [{"text": "in only"}]})(tmp_path / "single")
    # What datasets leaves beside its data when a saved data set is filtered or mapped.
    write(tmp_path / "one" / "cache-0123.arrow", [{"text": "left by somebody"}])

    def found(name, **choices):
        return [part.text for part in read_documents(find_files(str(tmp_path / name), **choices))]

    assert found("one") == [f"train {n}" for n in range(5)]
    assert found("several", split="test") == found("several/test") == ["in test"]
    assert found("single") == ["in only"]
    assert "2 .arrow" in (kinds := find_files(str(tmp_path / "one")).kinds) and "of a saved data set" in kinds
    with pytest.raises(DstrainError, match="no split 'dev'"):
        found("several", split="dev")
