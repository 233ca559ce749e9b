"""What files of data get wrong: one message for each, with its place, a reason and a way out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dstrain.data.chat.options import RecordOptions
from dstrain.data.prepare import prepare
from dstrain.errors import DstrainError
from tests.support.table_files import arrow_stream, encrypted, feather, parquet, saved, zstd
from tests.support.token_files import write_llm_c, write_megatron, write_nanogpt

CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
ALPACA = {"instruction": "a", "input": "", "output": "b"}
TEXT = {"text": "some text " * 9}
TOKEN_IDS = list(range(1, 51))


@dataclass(frozen=True)
class Bad:
    """Files by name, the source that is named, and what the message about it says.

    Attributes:
        files: bytes, or what writes the file to a path.
        source: below the folder of the files.
        where: the end of the place; the folder stands in front of it.
        words: parts of the reason.
        hint: a part of the way out.
        options: of `RecordOptions`.
    """

    files: dict[str, bytes | Callable[[Path], object]]
    source: str
    where: str
    words: tuple[str, ...]
    hint: str
    options: dict[str, object] = field(default_factory=dict)


def one(name, content, where, words, hint, **options):
    """A row for one file, which is named itself; ``where`` is behind its name."""
    return Bad(
        {name: content}, name, f"{name}{where}", (words,) if isinstance(words, str) else words, hint, options
    )


def lines(*records):
    return "".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in records).encode()


def cut(write, share):
    def written(path):
        write(path)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])

    return written


def with_damage(path):
    """A parquet file whose pages hold something else."""
    pq.write_table(pa.table({"text": [f"text {n} " * 50 for n in range(500)]}), path, compression="zstd")
    content = bytearray(path.read_bytes())
    content[200:400] = bytes(200)
    path.write_bytes(content)


def not_utf8(path):
    text = pa.array([b"good", b"M\xfcnchen"]).view(pa.string())
    pq.write_table(pa.table({"text": text}), path)


def two_columns_of_a_name(path):
    with pa.OSFile(str(path), "wb") as sink:
        table = pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
        with pa.ipc.new_file(sink, table.schema) as stream:
            stream.write_table(table)


TABLES = {
    "parquet: cut": one("a.parquet", cut(parquet(TEXT, TEXT), 0.7), "", "has no end", "copy it again"),
    "parquet: only its first bytes": one("a.parquet", b"PAR1", "", "not a parquet file", "copy it again"),
    "parquet: encrypted": one("a.parquet", encrypted("footer"), "", "is encrypted", "without encryption"),
    "parquet: encrypted columns": one(
        "a.parquet", encrypted("columns"), ": row group 1", "is encrypted", "without encryption"
    ),
    "parquet: damaged pages": one("a.parquet", with_damage, ": row group 1", "damaged", "copy it again"),
    "parquet: a footer of nonsense": one(
        "a.parquet", b"PAR1" + bytes(40) + b"\x07\0\0\0PAR1", "", "damaged", "copy it again"
    ),
    "parquet: no rows": one(
        "a.parquet", lambda path: pq.write_table(pa.table({"text": pa.array([], pa.string())}), path), "",
        "has no rows", "name another file",
    ),
    "parquet: a pointer of git LFS": one(
        "a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "", "pointer of git LFS",
        "git lfs pull",
    ),
    "parquet: text": one("a.parquet", b'{"text": "a"}\n' * 9, "", "not a parquet file", "wrong suffix"),
    "parquet: missing column": one(
        "a.parquet", parquet({"body": "a", "id": 1}), ": row group 1, row 1", "this row has no field 'text'",
        "data_fields.text=body",
    ),
    "parquet: the answer's column is missing": one(
        "a.parquet", parquet({"instruction": "a", "answer": "b"}), ": row group 1, row 1",
        "its fields are 'instruction', 'answer'", "each row is one object",
    ),
    "parquet: a mapped column is missing": one(
        "a.parquet", parquet(TEXT), ": row group 1, row 1", "no field 'body'", "each row is one object",
        data_format="text", data_fields={"text": "body"},
    ),
    "parquet: null": one(
        "a.parquet", parquet(TEXT, {"text": None}), ": row group 1, row 2", "holds null, not a string", "each row"
    ),
    "parquet: numbers": one(
        "a.parquet", parquet({"text": 5}), ": row group 1, row 1", "holds a number, not a string", "each row"
    ),
    "parquet: bytes": one(
        "a.parquet", parquet({"text": b"abc"}), ": row group 1, row 1", "holds bytes, not a string", "each row"
    ),
    "parquet: not UTF-8": one(
        "a.parquet", not_utf8, ": row group 1, row 2", ("is not UTF-8", "0xfc"), "write it as UTF-8"
    ),
    "parquet: two formats fit": one(
        "a.parquet", parquet(TEXT | {"prompt": "a", "completion": "b"}), ": row group 1, row 1",
        "could be in the format text or prompt-completion", "data_format=text",
    ),
    "parquet: messages as a string": one(
        "a.parquet", parquet({"messages": "[]"}), ": row group 1, row 1", "holds a string, not a list", "each row"
    ),
    "parquet: a null message": one(
        "a.parquet", parquet(CHAT, {"messages": None}), ": row group 1, row 2", "holds null, not a list", "each row"
    ),
    "parquet: too large a string": one(
        "a.parquet", lambda path: pq.write_table(pa.table({"text": ["a", "b" * (2**26 + 1)]}), path),
        ": row group 1, row 2", "more than 67,108,864 bytes", "max_document_bytes",
    ),
    "types that differ between files": Bad(
        {"d/a.parquet": parquet(TEXT), "d/b.parquet": parquet({"text": 5})}, "d", "d/b.parquet",
        ("the column 'text' holds whole numbers here, and strings in", "d/a.parquet"), "separate sources",
    ),
    "types that differ deep inside": Bad(
        {
            "d/a.parquet": parquet(CHAT),
            "d/b.arrow": arrow_stream({"messages": [{"role": "user", "content": ["a"]}]}),
        }, "d", "d/b.arrow", ("'messages[].content' holds lists here, and strings in",), "same types",
    ),
    "one of many is cut": Bad(
        {"d/a.parquet": parquet(TEXT), "d/b.parquet": cut(parquet(TEXT), 0.5)}, "d/*.parquet", "d/b.parquet",
        ("has no end",), "copy it again",
    ),
    "arrow: a cut stream": one("a.arrow", cut(arrow_stream(*[TEXT] * 9), 0.6), "", "no end mark", "copy it again"),
    "arrow: a cut file": one("a.feather", cut(feather(TEXT), 0.8), "", "this Arrow file has no end", "copy it again"),
    "arrow: the first Feather": one("a.feather", b"FEA1" + bytes(40), "", "first version of Feather", "write_feather"),
    "arrow: no rows": one(
        "a.arrow", arrow_stream(schema=pa.schema([("text", pa.string())])), "", "has no rows", "name another file"
    ),
    "arrow: something else": one("a.arrow", b"hello world, this is text", "", "not an Arrow file", "wrong suffix"),
    "arrow: parquet by its content": one("a.arrow", parquet(TEXT), "", "this file is parquet", ".parquet"),
    "arrow: two columns of a name": one(
        "a.arrow", two_columns_of_a_name, "", "two columns are called 'text'", "a name of its own"
    ),
    "arrow: null": one(
        "a.arrow", arrow_stream(TEXT, {"text": None}), ": batch 1, row 2", "holds null, not a string", "each row"
    ),
    "csv: a row too short": one(
        "a.csv", b"id,text\n1,a\n2\n", ":3", "has 1 cells, and the header 2", "double quotes"
    ),
    "csv: a row too long": one(
        "a.csv", b"id,text\n1,a, b\n", ":2", "has 3 cells, and the header 2", "double quotes"
    ),
    "csv: a quote that stays open": one(
        "a.csv", b'id,text\n1,a\n2,"b\n3,c\n', ":3", "never closed", "copy the file again"
    ),
    "csv: text behind a quote": one("a.csv", b'id,text\n1,"a"b\n', ":2", "not one of a table", "written twice"),
    "csv: two columns of a name": one("a.csv", b"text,text\na,b\n", ":1", "two columns are called", "its own"),
    "csv: Latin-1": one("a.csv", b"id,text\n1,a\n2,\xe9\n", ":3", "not UTF-8", "iconv -f WINDOWS-1252"),
    "csv: Japanese": one("a.csv", "text\n日本語の文章\n".encode("shift-jis"), ":2", "not UTF-8", "iconv -f ENCODING"),
    "json lines: Chinese": one(
        "a.jsonl", '{"text": "中文文本"}\n'.encode("gb18030"), ":1", "not UTF-8", "iconv -f ENCODING"
    ),
    "json lines: a damaged byte": one(
        "a.jsonl", '{"text": "größe"}\n{"text": "a'.encode() + b'\xe9"}\n', ":2", "not UTF-8", "iconv -c -f UTF-8"
    ),
    "text: a damaged byte behind the first block": one(
        "a.txt", ("größe\n" * 2**18).encode() + b"caf\xe9\n", f":{2**18 + 1}", "not UTF-8", "iconv -c -f UTF-8"
    ),
    "json: an object over several lines": one("a.json", b'{\n  "text": "a"\n}\n', ":1", "not JSON", "jq -c . FILE"),
    "json: objects without line ends": one(
        "a.jsonl", b'{"text": "a"}{"text": "b"}', ":1", "Extra data", "jq -c . FILE"
    ),
    "json: records inside of an object": one(
        "a.json", lines({"version": "1.1", "data": [TEXT, TEXT]}), ":1", "'version', 'data'", "jq -c '.data[]' FILE"
    ),
    "json: an array of nothing": one("a.json", b"[]", "", "holds no document", "name one with text"),
    "json lines: nested too deeply": one(
        "a.jsonl", b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", ":1", "nested too deeply", "each line"
    ),
    "csv: a cell that is no JSON": one(
        "a.csv", b'messages\n"[{""role"""\n', ":2", "the cell 'messages' is not JSON", "written as JSON"
    ),
    "csv: no such column": one(
        "a.csv", b"a,b\n1,2\n", ":2", "no field 'instruction'", "each row", data_format="alpaca"
    ),
    "csv: a header alone": one("a.csv", b"id,text\n", "", "has no rows", "name another file"),
    "tsv: with commas": one("a.tsv", b"text\tid\na,1\n", ":2", "has 1 cells, and the header 2", "delimiter"),
    "zst: cut": one("a.jsonl.zst", cut(lambda path: path.write_bytes(zstd(lines(*[TEXT] * 99))), 0.9), ":1",
        "incomplete or damaged zstd file", "zstd -t"),
    "zst: not packed": one("a.jsonl.zst", lines(TEXT), ":1", "incomplete or damaged zstd file", "zstd -t"),
}  # fmt: skip

TOKENS = {
    "tokens: beyond the vocabulary": one(
        "a.jsonl", lines({"input_ids": [1, 2]}, {"input_ids": [3, 257]}), ":2",
        "input_ids[1] is 257, and the tokenizer has the tokens 0 to 256", "name the tokenizer",
    ),
    "tokens: below zero": one("a.jsonl", lines({"input_ids": [-1]}), ":1", "input_ids[0] is -1", "the tokenizer"),
    "tokens: a fraction": one(
        "a.jsonl", lines({"input_ids": [1, 2.0]}), ":1", "input_ids[1] is 2.0, not a whole number", "each line"
    ),
    "tokens: a truth": one(
        "a.jsonl", lines({"input_ids": [True]}), ":1", "input_ids[0] is true or false, not", "each line"
    ),
    "tokens: a string": one(
        "a.jsonl", lines({"input_ids": "1 2"}), ":1", "holds a string, not a list of numbers", "each line"
    ),
    "tokens: nested": one(
        "a.parquet", parquet({"input_ids": [[1], [2]]}), ": row group 1, row 1", "input_ids[0] is an array", "each row"
    ),
    "tokens: null": one("a.jsonl", lines({"input_ids": None}), ":1", "holds null, not a list", "each line"),
    "tokens: enormous": one("a.jsonl", lines({"input_ids": [2**70]}), ":1", "more than 63 bits", "each line"),
    "tokens: no such field": one(
        "a.jsonl", lines({"ids": [1]}), ":1", "no field 'input_ids'; its fields are 'ids'", "each line",
        data_format="tokens",
    ),
    "labels: too few": one(
        "a.jsonl", lines({"input_ids": [1, 2], "labels": [1]}), ":1", "labels has 1 values, and input_ids 2", "each"
    ),
    "labels: of other tokens": one(
        "a.jsonl", lines({"input_ids": [1, 2, 3], "labels": [-100, 7, 3]}), ":1",
        "labels[1] is 7, which is neither input_ids[1] = 2 nor -100", "at its own place",
    ),
    "labels: shifted": one(
        "a.jsonl", lines({"input_ids": [1, 2, 3], "labels": [2, 3, -100]}), ":1", "labels[0] is 2", "shifted by one"
    ),
    "labels: nothing trained": one(
        "a.jsonl", lines({"input_ids": [1, 2], "labels": [1, -100]}), ":1", "no token of this record is trained",
        "on_bad_record: skip",
    ),
    "labels: in some records": one(
        "a.jsonl", lines({"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [1, 2]}), ":2",
        ("this record has no labels, and the one at", "a.jsonl:1 has some"), "into all records",
    ),
    "attention_mask: in front": one(
        "a.jsonl", lines({"input_ids": [1, 2], "attention_mask": [0, 1]}), ":1", "not ones and then zeros", "behind"
    ),
    "attention_mask: other numbers": one(
        "a.jsonl", lines({"input_ids": [1, 2], "attention_mask": [2, 0]}), ":1", "not ones and then zeros", "behind"
    ),
    "attention_mask: over labels": one(
        "a.jsonl", lines({"input_ids": [1, 2], "labels": [1, 2], "attention_mask": [1, 0]}), ":1",
        "labels[1] is 2, and attention_mask hides that token", "of padding are -100",
    ),
    "position_ids: two documents": one(
        "a.jsonl", lines({"input_ids": [1, 2], "position_ids": [0, 0]}), ":1", "do not count on from 0", "of its own"
    ),
    "tokens: beside texts": Bad(
        {"d/a.jsonl": lines({"input_ids": [1]}), "d/b.txt": b"text"}, "d", "d",
        ("b.txt is a text, and no tokens records",), "name the file",
    ),
}  # fmt: skip


def megatron(documents=((TOKEN_IDS,),), dtype="uint16", change=None, **others):
    """``change``: of the index's bytes, afterwards."""

    def write(path):
        write_megatron(path, documents, dtype, **others)
        if change is not None:
            index = path.with_suffix(".idx")
            index.write_bytes(change(index.read_bytes()))

    return write


def with_places(content):
    """Its second sequence begins elsewhere."""
    return content[:50] + (2).to_bytes(8, "little") + content[58:]


def in_index(write, words, hint):
    return Bad({"a.bin": write}, "a.bin", "a.idx", (words,), hint)


TOKEN_FILES = {
    "megatron: the index is cut": in_index(
        megatron(change=lambda idx: idx[:-4]), "this index has 58 bytes, and 1 sequences", "cut off"
    ),
    "megatron: another version": in_index(megatron(version=2), "has version 2, and 1 alone", "preprocess_data"),
    "megatron: fractions": in_index(megatron(dtype="float32"), "are float32, and tokens", "preprocess_data"),
    "megatron: an unknown type": in_index(megatron(code=77), "not known (77)", "preprocess_data"),
    "megatron: sequences elsewhere": in_index(
        megatron((([1, 2],), ([3, 4],)), change=with_places), "do not lie behind each other", "again"
    ),
    "megatron: more than text": in_index(megatron(modes=b"\1"), "more than text", "preprocess_data"),
    "megatron: bounds beyond its sequences": in_index(
        megatron(change=lambda idx: idx[:-8] + (9).to_bytes(8, "little")), "end at its last", "again"
    ),
    "megatron: the tokens are cut": one(
        "a.bin", lambda path: (megatron()(path), path.write_bytes(path.read_bytes()[:-2])), "",
        "has 98 bytes, and its index speaks of 100", "copy it and a.idx again",
    ),
    "megatron: no index": one(
        "a.bin", lambda path: write_nanogpt(path, TOKEN_IDS), "", "there is no index beside", "nanogpt",
        data_format="megatron",
    ),
    "megatron: another index": Bad(
        {"a.bin": b"ab", "a.idx": b"IDX"}, "a.bin", "a.bin", ("a.idx is no index",), "nanogpt",
        {"data_format": "megatron"},
    ),
    "megatron: beyond the vocabulary": one(
        "a.bin", megatron(((TOKEN_IDS, [1, 300]),)), "", "token 51 is 300, and the tokenizer has", "name the tokenizer"
    ),
    "megatron: below zero": one("a.bin", megatron((([1, -2],),), "int32"), "", "token 1 is -2", "name the tokenizer"),
    "megatron: no documents": one("a.bin", megatron(((),)), "", "the file is empty", "name one"),
    "nanogpt: not said": one(
        "a.bin", lambda path: write_nanogpt(path, [1000, 2000, 0]), "", "this is a binary file", "data_format=nanogpt"
    ),
    "nanogpt: not said, looks like a text": one(
        "a.bin", lambda path: write_nanogpt(path, TOKEN_IDS), "", "UTF-16", "data_format=nanogpt"
    ),
    "nanogpt: an odd size": one("a.bin", b"\1\0\2", "", "no whole number of tokens", "cut", data_format="nanogpt"),
    "nanogpt: too few to tell": one(
        "a.bin", lambda path: write_nanogpt(path, [1, 2], "uint32"), "", "too few to tell", "records",
        data_format="nanogpt",
    ),
    "nanogpt: of another tokenizer": one(
        "a.bin", lambda path: write_nanogpt(path, [50256, 9] * 50), "", "neither as 16 nor as 32 bits", "the tokenizer",
        data_format="nanogpt",
    ),
    "nanogpt: with an index": one(
        "a.bin", megatron(), "", "this file is in the format megatron", "data_format=megatron", data_format="nanogpt"
    ),
    "llm.c: cut": one(
        "a.bin", lambda path: write_llm_c(path, TOKEN_IDS, told=51), "", "speaks of 51 tokens, which take 1,126", "cut"
    ),
    "llm.c: without a header": one(
        "a.bin", lambda path: write_nanogpt(path, TOKEN_IDS), "", "does not begin with a header", "nanogpt",
        data_format="llm.c",
    ),
    "token files beside texts": Bad(
        {"d/a.bin": megatron(), "d/b.txt": b"text " * 30}, "d", "d",
        ("a.bin is a file of megatron, and b.txt of text or records",), "several sources",
    ),
    "token files of two formats": Bad(
        {"d/a.bin": megatron(), "d/b.bin": lambda path: write_llm_c(path, TOKEN_IDS)}, "d", "d",
        ("a.bin is a file of megatron, and b.bin of llm.c",), "several sources",
    ),
    "training and validation tokens": Bad(
        {"d/train.bin": lambda path: write_nanogpt(path, TOKEN_IDS), "d/val.bin": b"\1\0"}, "d", "d",
        ("both train.bin and val.bin would be trained on", "called val"), "d/**/*train*.bin",
        {"data_format": "nanogpt"},
    ),
    "a format of token files for a text": one(
        "a.txt", b"a text", "", "does not begin with a header", "nanogpt", data_format="llm.c"
    ),
    "a format of token files for a folder of texts": Bad(
        {"d/a.txt": b"text"}, "d", "d/a.txt", ("has no .bin file",), "leave data_format out",
        {"data_format": "megatron"},
    ),
}  # fmt: skip
MIXED = {
    "mixed: a text behind a conversation": one(
        "a.jsonl", lines(CHAT, TEXT), ":2",
        ("this record is in the format text, and the one at", "a.jsonl:1 is in messages"), "a source of one format",
    ),
    "mixed: a conversation behind a text": one(
        "a.jsonl", lines(TEXT, TEXT, CHAT), ":3",
        ("this record is in the format messages, and the one at", "a.jsonl:1 is in text"), "a source of one format",
    ),
    "mixed: between files": Bad(
        {"d/a.jsonl": lines(CHAT), "d/b.parquet": parquet(ALPACA)}, "d", "d/b.parquet: row group 1, row 1",
        ("this record is in the format alpaca, and the one at", "d/a.jsonl:1 is in messages"), "data_format=messages",
    ),
    "mixed: tokens among texts": one(
        "a.jsonl", lines(TEXT, {"input_ids": [1]}), ":2", ("in the format tokens", "a.jsonl:1 is in text"), "one format"
    ),
    "mixed: texts among tokens": one(
        "a.jsonl", lines({"input_ids": [1, 2]}, TEXT), ":2", ("in the format text", "a.jsonl:1 is in tokens"),
        "data_format=tokens",
    ),
    "mixed: a later record fits two": one(
        "a.jsonl", lines(TEXT, TEXT | CHAT), ":2", ("text or messages, and the one at", "a.jsonl:1"), "data_format=text"
    ),
    "mixed: sharegpt and messages": one(
        "a.jsonl",
        lines(
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            {"conversations": CHAT["messages"]},
        ), ":2", ("in the format messages", "a.jsonl:1 is in sharegpt"), "one format",
    ),
    "the first record fits two": one(
        "a.jsonl", lines(TEXT | {"input_ids": [1]}), ":1", "could be in the format text or tokens", "data_format=text"
    ),
}  # fmt: skip

SAVED = {
    "saved: several splits": Bad(
        {"d": saved({"train": [TEXT], "test": [TEXT]})}, "d", "d", ("several splits: train, test",), "/train"
    ),
    "saved: deeper in a folder": Bad(
        {"d/deep": saved({"train": [TEXT], "test": [TEXT]})}, "d", "d/deep", ("several splits",), "/train"
    ),
    "saved: a file is missing": Bad(
        {"d": saved([TEXT] * 4, lose="data-00001-of-00002.arrow", shards=2)}, "d", "d",
        ("1 of its 2 files are missing, the first is data-00001-of-00002.arrow",), "copy it again",
    ),
    "saved: a split is missing": Bad(
        {"d": saved({"train": [TEXT]}, lose="train/state.json")}, "d", "d/train", ("no state.json",), "copy it again"
    ),
    "saved: a broken state": Bad(
        {"d/state.json": b"{", "d/dataset_info.json": b"{}"}, "d", "d/state.json", ("not JSON",), "copy it again"
    ),
    "saved: files elsewhere": Bad(
        {
            "d/state.json": b'{"_data_files": [{"filename": "../../x.arrow"}]}',
            "d/dataset_info.json": b"{}",
        }, "d", "d/state.json", ("does not name the files",), "save the data set again",
    ),
    "saved: no splits": Bad(
        {"d/dataset_dict.json": b'{"splits": []}'}, "d", "d/dataset_dict.json", ("names no splits",), "again"
    ),
}  # fmt: skip

NAMES = {
    "a pattern without a file": Bad({}, "none/*.parquet", "none/*.parquet", ("no file matches",), "quotes"),
    "a pattern of folders": Bad(
        {"d/e/f.txt": b"a"}, "d/*", "d/*", ("no file matches", "1 folders do"), "any depth"
    ),
    "a pattern with an empty file": Bad(
        {"d/a.txt": b""}, "d/*.txt", "d/a.txt", ("the file is empty",), "with text"
    ),
}

ROWS = {**TABLES, **TOKENS, **TOKEN_FILES, **MIXED, **SAVED, **NAMES}


@pytest.mark.parametrize("name", ROWS)
def test_a_bad_source(tmp_path, name):
    row = ROWS[name]
    for file, content in row.files.items():
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content) if isinstance(content, bytes) else content(path)
    with pytest.raises(DstrainError) as refused:
        prepare(
            str(tmp_path / row.source),
            "bytes",
            16,
            0.0,
            tmp_path / "cache",
            records=RecordOptions(**row.options),
        )
    error = refused.value
    assert error.where == str(tmp_path / row.where)
    assert not [words for words in row.words if words not in error.message], error.message
    assert error.hint and row.hint in error.hint, error.hint
    assert not list(tmp_path.glob("cache/*.part")), "nothing half done is left"
