"""Finding and reading sources: what is found, in which order, and each way that it can go wrong."""

import bz2
import dataclasses
import gzip
import json
import lzma
import os
import socket

import pyarrow
import pytest

from dstrain.data.listing import sources
from dstrain.data.listing.sources import find_files, source_summary
from dstrain.data.reading import json_array
from dstrain.data.reading.documents import read_documents
from dstrain.errors import DstrainError


def zstd(content):
    """In two frames, as parallel packers write them."""
    half = len(content) // 2
    frames = []
    for part in (content[:half], content[half:]):
        sink = pyarrow.BufferOutputStream()
        with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(part)
        frames.append(sink.getvalue().to_pybytes())
    return b"".join(frames)


def packed(content, name):
    if name.endswith("gz"):
        return gzip.compress(content)
    return zstd(content) if name.endswith("zst") else content


def texts(source):
    return [document.text for document in read_documents(find_files(str(source)))]


def test_stdlib_is_sorted_library_code_that_all_decodes():
    source = find_files("stdlib")
    names = [file.relative for file in source.files]
    assert names == sorted(names)
    assert {"os.py", "json/decoder.py", "asyncio/base_events.py"} <= set(names)
    folders = {part for name in names for part in name.split("/")}
    assert not folders & {
        "test",
        "tests",
        "idlelib",
        "site-packages",
        "dist-packages",
        "ensurepip",
        "__pycache__",
    }
    documents = list(read_documents(source))
    assert len(documents) == len(names)
    assert documents[-1].bytes_read == source.bytes > 5_000_000


def test_a_file_of_any_name_is_one_document_kept_to_the_byte(tmp_path):
    path = tmp_path / "notes.unknown"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\n\n \xc3\xa9")
    assert texts(path) == ["one\r\ntwo\n\n é"]
    assert source_summary(find_files(str(path))) == {"files": 1, "bytes": 16, "documents": 1}


def test_a_folder_is_read_recursively_in_order_without_hidden_and_other_files(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "b" / "x.md").write_text("bx")
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "a.py").write_text("a")
    (tmp_path / "c.jsonl").write_text('{"text": "c1"}\n\n{"text": "c2", "id": 7}\n')
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b'{"text": "d"}'))
    (tmp_path / "picture.png").write_bytes(b"\0\1")
    (tmp_path / "index.json").write_text("[]")
    (tmp_path / ".git" / "h.txt").write_text("hidden")
    assert texts(tmp_path) == ["a", "b", "bx", "c1", "c2", "d"]
    assert set(source_summary(find_files(str(tmp_path)))) == {"files", "bytes"}


def test_linked_folders_are_read_once_and_loops_end(tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.txt").write_text("x")
    (tmp_path / "corpus" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "corpus" / "loop").symlink_to(tmp_path / "corpus")
    assert texts(tmp_path / "corpus") == ["x"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.ndjson", "a.jsonl.gz", "a.jsonl.zst", "a.json.zst"])
def test_json_lines(tmp_path, name):
    lines = "".join(
        json.dumps({"text": text}) + "\n" for text in ["eins", "zwei\n", "", "dreißig \u0000"]
    ).encode()
    path = tmp_path / name
    path.write_bytes(packed(lines, name))
    source = find_files(str(path))
    documents = list(read_documents(source))
    assert [document.text for document in documents] == ["eins", "zwei\n", "", "dreißig \u0000"]
    assert documents[-1].bytes_read == source.bytes


def refused(source):
    with pytest.raises(DstrainError) as caught:
        texts(source)
    return caught.value


@pytest.mark.parametrize(
    ("name", "content", "place", "words"),
    [
        ("a.txt", b"", "", "empty"),
        ("a.txt", b"ok\xff\n", ":1", "0xff"),
        ("a.txt", b"ok\nok\nM\xfcnchen", ":3", "not UTF-8"),
        ("a.txt", b"PK\0\1", "", "binary"),
        ("a.jsonl", '{"text": "grün"}'.encode("utf-16"), "", "UTF-16"),
        ("a.jsonl", '{"text": "grün"}'.encode("utf-16-le"), "", "UTF-16"),
        ("a.jsonl", '{"text": "grün"}'.encode("utf-16-be"), "", "UTF-16"),
        ("a.jsonl", '{"text": "grün"}'.encode("utf-32"), "", "UTF-32"),
        ("a.txt", '{"text": "grün"}'.encode("utf-32"), "", "UTF-32"),
        ("a.jsonl", gzip.compress(b'{"text": "a"}', mtime=0), "", "compressed (gzip)"),
        ("a.jsonl", bz2.compress(b'{"text": "a"}'), "", "compressed (bzip2)"),
        ("a.jsonl", lzma.compress(b'{"text": "a"}'), "", "compressed (xz)"),
        ("a.txt", lzma.compress(b"text"), "", "compressed (xz)"),
        ("a.jsonl", b"\x28\xb5\x2f\xfd\x20\x0d\x69\x00\x00", "", "compressed (zstd)"),
        ("a.jsonl", b"PK\x03\x04rest", "", "zip"),
        ("a.jsonl", b"PAR1\x15\x04", "", "parquet"),
        ("a.jsonl.gz", gzip.compress(lzma.compress(b"text"), mtime=0), "", "compressed (xz)"),
        ("a.json", b'[{"text": "a"}, {"text": "b"]', ":1", "not JSON"),
        ("a.json", b'[{"text": "a"},\n {"text": "b"}\n', ":3", "may be cut off"),
        ("a.json", b'[{"text": "a"},\n {"text": "b', ":2", "not JSON"),
        ("a.json", b'[{"text": "a"},\n]', ":2", "comma before the end"),
        ("a.json", b'[{"text": "a"}\n{"text": "b"}]', ":2", "is missing"),
        ("a.json", b'[{"text": "a"}]\n{"text": "b"}', ":2", "behind the end"),
        ("a.json", b'[{"text": "a"},\n\n{"instruction": "b", "input": ""}]', ":3", "'instruction', 'input'"),
        ("a.json", b'[\n"text"]', ":2", "this element holds a string"),
        ("a.json", b'[[{"text": "a"}]]', ":1", "this element holds an array"),
        ("a.json", b'[\n{"text": "\xe9"}]', ":2", "not UTF-8"),
        ("a.txt", "gr\u00fcn und viel".encode("utf-16-le"), "", "UTF-16"),
        ("a.txt", "gr\u00fcn und viel".encode("utf-32-be"), "", "UTF-32"),
        ("a.txt", b"a.txt" + bytes(252) + b"ustar\x0000", "", "tar archive"),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "", "pointer of git LFS"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "", "pointer of git LFS"),
        ("a.txt", b"%PDF-1.7\n", "", "PDF"),
        ("a.txt", b"7z\xbc\xaf\x27\x1c\0\4", "", "7z"),
        ("a.jsonl", b"\x04\x22\x4d\x18d", "", "lz4"),
        ("a.txt", "grün".encode("utf-16"), "", "UTF-16"),
        ("a.txt.gz", gzip.compress(b"text", mtime=0), "", "compressed"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', ":2", "not JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"body": "b", "id": 1}\n', ":2", "'body', 'id'"),
        ("a.jsonl", b'{"text": 5}', ":1", "a number"),
        ("a.jsonl", b'{"text": null, "id": 3}', ":1", "null"),
        ("a.jsonl", b'{"text": ["a"]}', ":1", "an array"),
        ("a.jsonl", b'\n["text"]', ":2", "this element holds a string"),
        ("a.json", b'{\n "text": "pretty"\n}', ":1", "not JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', ":2", "not UTF-8"),
        ("a.jsonl", b'{"text": "\\ud800"}', ":1", "surrogate"),
        ("a.jsonl", b"[" * 100_000, ":1", "nested"),
        ("a.jsonl", b'\n{"text": ' + b"[" * 100_000, ":2", "nested"),
        ("a.jsonl.gz", b"no gzip", "", "gzip"),
        ("a.jsonl.zst", b"no zstd", ":1", "damaged zstd"),
        ("a.jsonl.zst", zstd(b'{"text": "a"}\n' * 99)[:-4], ":1", "incomplete or damaged zstd"),
        ("a.json.zst", zstd(lzma.compress(b"text")), "", "compressed (xz)"),
        ("a.jsonl.zst", zstd(b'{"text": "a"}\n{"text": 3}'), ":2", "a number, not a string"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}' * 99, mtime=0)[:-9], "", "gzip"),
    ],
)
def test_what_is_no_text_is_refused_with_its_place(tmp_path, name, content, place, words):
    path = tmp_path / name
    path.write_bytes(content)
    error = refused(path)
    assert error.where == f"{path}{place}"
    assert words in error.message


@pytest.mark.parametrize("indent", [None, 1], ids=["one line", "pretty"])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.jsonl.gz", "a.ndjson.zst"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf", b"\n \n"], ids=["", "marked", "blank lines"])
def test_one_json_array_is_read_element_by_element(tmp_path, monkeypatch, mark, name, indent):
    """Blocks end anywhere: inside of letters, escapes and numbers."""
    wanted = ["eins \U0001f600", "", '[]{},\\ "', "z" * 3000, "drei\u00dfig\n\u0000"] * 40
    records = [
        {"id": 10**400 + i, "ok": [True, None, -1.5e-7], "text": text} for i, text in enumerate(wanted)
    ]
    content = json.dumps(records, indent=indent, ensure_ascii=name == "a.json").encode()
    content = mark + content
    path = tmp_path / name
    path.write_bytes(packed(content, name))
    for block in (1, 7, 1000, 2**16):
        monkeypatch.setattr(json_array, "_BLOCK", block)
        assert texts(path) == wanted


def test_an_empty_array_holds_no_document(tmp_path):
    (tmp_path / "a.json").write_text(" [ \n ]\n")
    assert texts(tmp_path / "a.json") == []


def test_an_element_of_an_array_has_a_limit(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "a"}, {"text": "b" * 300_000}], indent=0))
    source = dataclasses.replace(find_files(str(path)), max_document_bytes=200_000)
    with pytest.raises(DstrainError, match="this element has more than 200,000 bytes") as caught:
        list(read_documents(source))
    assert caught.value.where == f"{path}:5" and "max_document_bytes" in caught.value.hint


def test_numbers_that_nobody_reads_may_have_any_length(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "id": ' + "9" * 6000 + ', "score": -' + "1" * 6000 + "}\n")
    assert texts(path) == ["a"]


def test_missing_paths_are_refused(tmp_path):
    assert "no such file" in refused(tmp_path / "nowhere").message
    assert "no such file" in refused("roneneldan/TinyStories").message
    assert "a data set on the hub like org/name" in refused(tmp_path / "nowhere").hint
    assert refused("s3://bucket//x").message.startswith("s3://bucket//x is an address")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    assert "broken link" in refused(tmp_path / "link").message
    assert "no data source" in refused(" ").message
    assert "can't be read" in refused("a\0b").message


def test_folders_without_text_are_refused(tmp_path):
    assert "the folder is empty" in refused(tmp_path).message
    (tmp_path / "a.png").write_bytes(b"x")
    assert ".png" in refused(tmp_path).message
    (tmp_path / "a.txt").write_bytes(b"")
    assert "all 1 text files are empty" in refused(tmp_path).message


def test_a_folder_counts_what_is_read_and_what_is_left_out(tmp_path, monkeypatch):
    (tmp_path / "a.md").write_text("a" * 2000)
    (tmp_path / "b.MD").write_text("b")
    (tmp_path / "c.ndjson").write_text('{"text": "c"}\n')
    for name in ("1.orc", "2.orc"):
        (tmp_path / name).write_bytes(bytes(100))
    (tmp_path / "d.txt.zst").write_bytes(b"z" * 300)
    (tmp_path / "LICENSE").write_bytes(b"l")
    (tmp_path / "film.mp4").write_bytes(bytes(10**6))
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "null").symlink_to("/dev/null")
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)  # the kernel takes 107 characters
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        source = find_files(str(tmp_path))
    assert [document.text[:1] for document in read_documents(source)] == ["a", "b", "c"]
    assert source.kinds == "2 .md (2 kB), 1 .ndjson (14 bytes)"
    assert source.left_out == (
        "1 .mp4 (1 MB), 1 .txt.zst (300 bytes), 2 .orc (200 bytes), LICENSE, gone (a broken link),"
        " loop (a broken link), 3 other files"
    )


@pytest.mark.parametrize(
    ("name", "way_out"),
    [
        ("train.orc", "to_parquet"),
        ("train.json", "name it .jsonl"),
        ("train.txt.zst", "decompress"),
        ("train.txt.gz", "decompress"),
        ("all.tar", "decompress"),
        ("weights.bin", "name a folder with that alone"),
        ("NO_SUFFIX", "name a folder with that alone"),
    ],
)
def test_a_folder_of_which_most_would_be_left_out_is_refused(tmp_path, name, way_out):
    (tmp_path / "README.md").write_text("# A data set\n")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / name).write_bytes(bytes(100))
    error = refused(tmp_path)
    assert "most of this folder would be left out" in error.message and "1 .md (13 bytes)" in error.message
    assert os.path.splitext(name)[1] in error.message and way_out in error.hint
    (tmp_path / "README.md").write_text("x" * 100)
    assert name.rpartition(".")[2] in find_files(str(tmp_path)).left_out


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_what_is_called_text_and_is_no_file_is_refused(tmp_path, name):
    os.mkfifo(tmp_path / name)
    assert "this is a pipe" in refused(tmp_path).message
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    assert "this is a device" in refused(tmp_path).message
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to(tmp_path / "gone")
    assert "broken link" in refused(tmp_path).message
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to(tmp_path / name)
    assert refused(tmp_path).where == str(tmp_path / name)


def test_what_is_neither_file_nor_folder_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "neither" in refused(tmp_path / "pipe").message


def test_what_may_not_be_read_is_refused(tmp_path, monkeypatch):
    # Tests may run as root, for whom every file is readable; so the answer of the system is played.
    (tmp_path / "a.txt").write_text("a")
    monkeypatch.setattr(sources.os, "access", lambda path, mode: False)
    assert refused(tmp_path / "a.txt").where == str(tmp_path / "a.txt")
    assert "Permission denied" in refused(tmp_path).message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may enter every folder")
def test_a_folder_that_may_not_be_entered_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "closed").mkdir(mode=0)
    assert refused(tmp_path).where == str(tmp_path / "closed")


def test_a_python_without_library_files_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda name: str(tmp_path))
    assert "standard library" in refused("stdlib").message
