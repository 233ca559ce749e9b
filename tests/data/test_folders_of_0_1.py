"""A run of version 0.1 goes on with the files that it has begun with, whatever else lies in its folder."""

from __future__ import annotations

import gzip
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dstrain.config.loader import read_config
from dstrain.data.listing.sources import find_files
from dstrain.data.prepare import PackedData, prepare, prepare_as_asked
from dstrain.planning.data_parts import data_parts
from dstrain.planning.plan import Plan
from tests.support.plans import plan
from tests.support.table_files import parquet, saved, zstd
from tests.support.token_files import write_llm_c

LINE = b'{"text": "a line of some text"}\n'
TABLE = b"text,number\na text in a table,1\n"


def lay(folder: Path) -> Path:
    """What 0.1 has read is named in the order in which it was."""
    folder.mkdir()
    (folder / "a.csv").write_bytes(TABLE)
    (folder / "b.txt").write_text("a text " * 9)
    (folder / "c.train.jsonl").write_bytes(LINE * 5)
    (folder / "d.valid.jsonl.gz").write_bytes(gzip.compress(LINE * 3))
    return folder


def prepared_as_before(data: Path, place: Path) -> PackedData:
    """As a resumed run whose config has no key for the format yet."""
    place.mkdir(exist_ok=True)
    config = place / "config.yaml"
    config.write_text(f"model: tiny\ndata: {data}\nseq_len: 8\nvalidation: 0.0\n")
    resolved = read_config(config).config
    [part] = data_parts(resolved)
    return prepare_as_asked(part.request(resolved, tokenizer="bytes", cache_dir=place / "cache", own=None))


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """With all that is read now, and was passed over then."""
    folder = lay(tmp_path / "mixed")
    parquet(*[{"text": "of a table"}] * 500)(folder / "t.parquet")
    pq.write_table(pa.table({"other": [1]}), folder / "u.parquet")
    (folder / "v.arrow").write_bytes(b"anything")
    (folder / "w.jsonl.zst").write_bytes(zstd(LINE))
    (folder / "x.json.gz").write_bytes(gzip.compress(LINE))
    write_llm_c(folder / "y.bin", [1, 2, 3])
    saved({"train": [{"text": "a"}], "test": [{"text": "b"}]})(folder / "z")
    return folder


def test_what_was_passed_over_still_is(tmp_path: Path, mixed: Path) -> None:
    found = find_files(str(mixed), data_format="text-0.1")
    kinds = [(file.relative, file.kind) for file in found.files]
    assert kinds == [
        ("a.csv", "text"),
        ("b.txt", "text"),
        ("c.train.jsonl", "json lines"),
        ("d.valid.jsonl.gz", "json lines"),
    ]
    assert ".parquet" in found.left_out and ".bin" in found.left_out


def test_its_rows_are_those_that_it_had(tmp_path: Path, mixed: Path) -> None:
    data = prepared_as_before(mixed, tmp_path / "run")
    texts = tmp_path / "texts"
    texts.mkdir()
    for name, content in (
        ("a.txt", TABLE),
        ("b.txt", b"a text " * 9),
        ("c.jsonl", LINE * 8),
    ):
        (texts / name).write_bytes(content)
    wanted = prepare(str(texts), "bytes", 8, 0.0, tmp_path / "cache", begin="never")
    assert data.documents == 10 and data.fingerprint == wanted.fingerprint


@pytest.mark.parametrize("name", ["a.csv", "text.bin"])
def test_a_file_that_was_a_text_is_one(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(TABLE)
    (tmp_path / "text.txt").write_bytes(TABLE)
    wanted = prepare(str(tmp_path / "text.txt"), "bytes", 8, 0.0, tmp_path / "cache", begin="never")
    assert prepared_as_before(tmp_path / name, tmp_path / "run").fingerprint == wanted.fingerprint


def test_the_ranks_read_what_the_plan_meant() -> None:
    record = plan().to_record()
    del record["config"]["data_format"]
    assert Plan.from_record(record).run_config.data_format == "text-0.1"
