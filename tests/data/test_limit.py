"""``limit`` of a source: the first documents, of every kind of file, and nothing behind them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

from dstrain.data.prepare import PackedData, prepare

TEXTS = [f"document {number} of some words" for number in range(40)]
CHATS = [[{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}] for text in TEXTS]


def write(kind: str, folder: Path) -> Path:
    path = folder / f"data.{kind.partition(' ')[0]}"
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    table = pa.table({"text": TEXTS})
    if kind == "jsonl":
        path.write_text(lines)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif kind == "json array":
        path.write_text(json.dumps([{"text": text} for text in TEXTS]))
    elif kind == "parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=5)
    elif kind == "feather":
        pyarrow.feather.write_feather(table, str(path))
    elif kind == "csv":
        path.write_text("text\n" + "".join(f"{text}\n" for text in TEXTS))
    elif kind == "jsonl of conversations":
        path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS))
    elif kind == "jsonl of tokens":
        path.write_text("".join(json.dumps({"input_ids": [*text.encode(), 256]}) + "\n" for text in TEXTS))
    elif kind == "jsonl of tokens with labels":
        rows = [
            {"input_ids": [*text.encode(), 256], "labels": [-100, *text.encode()[1:], 256]} for text in TEXTS
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "bin of nanoGPT":
        np.array([token for text in TEXTS for token in (*text.encode(), 256)], "<u2").tofile(path)
    else:
        assert kind == "folder"
        path.mkdir()
        for number, text in enumerate(TEXTS):
            (path / f"{number:02}.txt").write_text(text)
    return path


KINDS = (
    *("jsonl", "jsonl.gz", "json array", "parquet", "feather", "csv", "folder", "bin of nanoGPT"),
    *("jsonl of conversations", "jsonl of tokens", "jsonl of tokens with labels"),
)


def prepared(path: Path, cache: Path, limit: int | None) -> PackedData:
    from dstrain.data.chat.options import RecordOptions

    records = RecordOptions(data_format="nanogpt" if path.suffix == ".bin" else "auto")
    return prepare(str(path), "bytes", 64, 0.0, cache, records=records, limit=limit)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_documents_alone(kind: str, tmp_path: Path) -> None:
    path = write(kind, tmp_path)
    whole = prepared(path, tmp_path / "cache", None)
    some = prepared(path, tmp_path / "cache", 7)
    assert (whole.documents, some.documents) == (40, 7)
    assert some.lengths.tolist() == whole.lengths[:7].tolist()
    assert some.fingerprint != whole.fingerprint
    more = prepared(path, tmp_path / "cache", 100)
    assert more.documents == 40 and more.fingerprint == whole.fingerprint


def test_what_lies_behind_the_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS) + "no JSON\n")
    assert prepared(path, tmp_path / "cache", 40).documents == 40
