"""Files of tokens are read where they lie, and train what records of the same tokens train."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest

from dstrain.data import token_cache
from dstrain.data.chat.options import RecordOptions
from dstrain.data.listing.sources import find_files
from dstrain.data.prepare import main, prepare
from dstrain.data.rows.packing import IGNORED
from dstrain.data.token_files import mapped as pretokenized
from dstrain.data.token_files.mapped import MappedTokens
from dstrain.data.tokenizing.tokenizers import ByteTokenizer
from dstrain.errors import DstrainError
from tests.support.token_files import write_llm_c, write_megatron, write_nanogpt

END = 256
DOCUMENTS = [
    [*ByteTokenizer().encode(f"document number {number} of some").tolist(), END] for number in range(40)
]
FLAT = [token for document in DOCUMENTS for token in document]


def prepared(tmp_path, source, seq_len=32, validation=0.25, pack=True, **options):
    cache = tmp_path / "cache"
    return prepare(str(source), "bytes", seq_len, validation, cache, pack, records=RecordOptions(**options))


@pytest.fixture
def records(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text("".join(f"{json.dumps({'input_ids': one})}\n" for one in DOCUMENTS))
    return path


def megatron(path, dtype="uint16"):
    return write_megatron(path, [[one] for one in DOCUMENTS], dtype)


WRITE = {
    "megatron": (megatron, {}),
    "megatron, 32 bits": (lambda path: megatron(path, "int32"), {}),
    "megatron, named": (megatron, {"data_format": "megatron"}),
    "nanogpt": (lambda path: write_nanogpt(path, FLAT), {"data_format": "nanogpt"}),
    "nanogpt, 32 bits": (lambda path: write_nanogpt(path, FLAT, "uint32"), {"data_format": "nanogpt"}),
    "llm.c": (lambda path: write_llm_c(path, FLAT), {}),
    "llm.c, 32 bits": (lambda path: write_llm_c(path, FLAT, wide=True), {"data_format": "llm.c"}),
}


@pytest.mark.parametrize("kind", WRITE)
@pytest.mark.parametrize("pack", [True, False])
def test_they_are_what_records_of_the_same_tokens_are(tmp_path, records, kind, pack, monkeypatch):
    write, options = WRITE[kind]
    wanted = prepared(tmp_path, records, pack=pack)
    monkeypatch.setattr(pretokenized, "_BLOCK", 100)
    data = prepared(tmp_path, write(tmp_path / "a.bin"), pack=pack, **options)
    assert data.fingerprint == wanted.fingerprint
    rows = np.arange(len(wanted.train))
    for found, one in zip(data.train.rows(rows), wanted.train.rows(rows), strict=True):
        assert (found == one).all()
    summary = data.summary()
    assert (summary["format"], summary["ends_with"]) == (kind.split(",")[0], "<|endoftext|>")
    assert (summary["documents"], summary["validation_documents"]) == (40, 10)


def test_nothing_is_copied(tmp_path):
    data = prepared(tmp_path, megatron(tmp_path / "a.bin"))
    assert sorted(path.name for path in data.folder.iterdir()) == ["lengths.npy", "meta.json", "starts.npy"]
    assert data.folder == prepared(tmp_path, tmp_path / "a.bin", seq_len=64).folder


def test_several_files_are_one_stream(tmp_path, records):
    folder = tmp_path / "shards"
    folder.mkdir()
    write_megatron(folder / "a.bin", [[one] for one in DOCUMENTS[:9]])
    write_megatron(folder / "b.bin", [[one] for one in DOCUMENTS[9:]], "int32")
    wanted = prepared(tmp_path, records)
    data = prepared(tmp_path, folder)
    assert data.fingerprint == wanted.fingerprint == prepared(tmp_path, f"{folder}/*.bin").fingerprint
    assert prepared(tmp_path, f"{folder}/*").fingerprint == wanted.fingerprint
    rows = np.arange(len(wanted.train))
    assert (data.train.rows(rows).input_ids == wanted.train.rows(rows).input_ids).all()
    assert "2 .bin of megatron (" in find_files(str(folder)).kinds


def test_a_prefix_or_an_index_names_both_files(tmp_path):
    path = megatron(tmp_path / "corpus_text_document.bin")
    wanted = prepared(tmp_path, path)
    for name in ("corpus_text_document", "corpus_text_document.idx"):
        assert prepared(tmp_path, tmp_path / name).folder == wanted.folder


def test_sequences_of_a_document_are_put_together(tmp_path):
    halves = [[one[:5], one[5:]] for one in DOCUMENTS]
    whole = prepared(tmp_path, megatron(tmp_path / "a.bin"))
    assert prepared(tmp_path, write_megatron(tmp_path / "b.bin", halves)).fingerprint == whole.fingerprint
    assert (
        prepared(tmp_path, write_megatron(tmp_path / "c.bin", halves, modes=bytes(80))).fingerprint
        == whole.fingerprint
    )


def test_documents_without_text_are_counted_and_left_out(tmp_path):
    """As a stream that begins with an end, and ends without one."""
    tokens = [END, 1, 2, END, END, 3, 4, END, 5, 6, 7, 8] * 4
    data = prepared(tmp_path, write_nanogpt(tmp_path / "a.bin", tokens), 8, 0.0, data_format="nanogpt")
    assert data.documents == 12 and data.empty_documents == 5
    assert data.lengths.tolist() == [3, 3, 5, 3, 3, 5, 3, 3, 5, 3, 3, 4]
    assert data.summary()["ends_with"] == ""
    batch = data.train.rows(np.array([0]))
    assert batch.input_ids[0].tolist() == [1, 2, END, 3, 4, END, 5, 6]
    assert batch.labels[0].tolist() == [2, END, IGNORED, 4, END, IGNORED, 6, 7]
    from_megatron = write_megatron(tmp_path / "m.bin", [[[1, 2, END]], [], [[]], [[END]], [[3, 4, END]]] * 3)
    assert prepared(tmp_path, from_megatron, 8, 0.0).empty_documents == 9


def test_mapped_tokens_are_found_by_their_places():
    parts = [np.arange(5, dtype=np.uint16), np.zeros(0, np.uint16), np.arange(5, 9, dtype=np.int32)]
    tokens = MappedTokens(parts)
    at = np.array([[0, 8, 4], [5, 3, 7]])
    assert tokens.size == 9 and (tokens[at] == at).all()


def test_a_file_that_changes_is_scanned_again(tmp_path):
    path = megatron(tmp_path / "a.bin")
    first = prepared(tmp_path, path)
    status = path.stat()
    content = np.fromfile(path, dtype=np.uint16)
    content[3] = 7
    content.tofile(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # as a copy that keeps times
    again = prepared(tmp_path, path)
    assert again.fingerprint != first.fingerprint
    content[3] = 999
    content.tofile(path)
    with pytest.raises(DstrainError, match="token 3 is 999"):
        prepared(tmp_path, path)


def test_a_summary_is_kept(tmp_path):
    """Of tokens in place too; and it is not believed once where they are is gone."""
    path = megatron(tmp_path / "a.bin")
    request = {
        "source": str(path), "tokenizer": "bytes", "cache_dir": str(tmp_path / "cache"), "seq_len": 16,
        "validation": 0.25, "pack": True, "begin": "auto",
    }  # fmt: skip
    (tmp_path / "request.json").write_text(json.dumps(request))
    assert main([str(tmp_path / "request.json"), str(tmp_path / "out.json")]) == 0
    summary = json.loads((tmp_path / "out.json").read_text())
    from dstrain.data.dataset_summary_cache import read_summary, summary_file, tokenizer_state

    choices = {key: request[key] for key in ("seq_len", "validation", "pack", "begin")}
    file = summary_file(tmp_path / "cache", find_files(str(path)), tokenizer_state("bytes"), **choices)
    assert read_summary(file) == summary and summary["format"] == "megatron"
    [folder] = [one.parent for one in (tmp_path / "cache").glob("*/starts.npy")]
    shutil.rmtree(folder)
    assert read_summary(file) is None


def test_tokens_of_a_large_vocabulary_are_told_apart(tmp_path):
    """Where all that 16 bits hold are tokens, so are most pairs of them."""

    class Large(ByteTokenizer):
        vocab_size = 150_000

    rng = np.random.default_rng(0)
    for dtype, largest in (("uint16", 50_000), ("uint32", 150_000)):
        path = write_nanogpt(tmp_path / f"{dtype}.bin", rng.integers(0, largest, 4000).tolist(), dtype)
        source = find_files(str(path), data_format="nanogpt")
        scanned = pretokenized.scan(pretokenized.TokenFiles(source, "nanogpt"), Large())
        assert scanned.files[0].tokens == 4000 and scanned.files[0].dtype == f"<u{np.dtype(dtype).itemsize}"


def test_the_cache_of_a_relative_path_serves_in_every_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = megatron(tmp_path / "a.bin")
    wanted = prepared(tmp_path, "a.bin")
    monkeypatch.chdir("/")
    monkeypatch.setattr(token_cache, "_build", None)
    assert prepared(tmp_path, path).fingerprint == wanted.fingerprint
