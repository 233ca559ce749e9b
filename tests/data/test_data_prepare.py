"""The whole way from a source to rows: the cache, those who share it, and the errors."""

import json
import os
import tempfile
import threading
import time

import numpy as np
import pytest

from dstrain.config.loader import load_config
from dstrain.data import token_cache
from dstrain.data.prepare import prepare
from dstrain.data.rows.packing import IGNORED
from dstrain.errors import DstrainError
from dstrain.planning.data_parts import data_parts


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(20):
        (folder / f"{number:02}.txt").write_text(f"document {number}: " + "abc " * number)
    (folder / "empty.txt").write_text("")
    return folder


def everything(packed):
    return packed.rows(np.arange(len(packed)))


def test_rows_spell_the_documents(corpus, tmp_path):
    data = prepare(str(corpus), "bytes", 32, 0, tmp_path / "cache")
    whole = b"".join(path.read_bytes() + b"|" for path in sorted(corpus.glob("??.txt")))
    ids = everything(data.train).input_ids.ravel()
    assert bytes(np.where(ids == 256, ord("|"), ids).astype(np.uint8)) == whole[: ids.size]
    summary = data.summary()
    assert summary["tokens"] == len(whole)
    assert summary["bytes"] == len(whole) - 20
    assert (summary["files"], summary["documents"], summary["empty_documents"]) == (21, 20, 1)
    assert (summary["train_rows"], summary["validation_rows"]) == (len(whole) // 32, 0)
    assert data.validation is None
    assert json.loads(json.dumps(summary)) == summary


def test_validation_documents_are_not_trained_on(corpus, tmp_path):
    data = prepare(str(corpus), "bytes", 16, 0.2, tmp_path / "cache")
    assert data.summary()["validation_documents"] == 4
    trained = data.tokenizer.decode(everything(data.train).input_ids)
    held = data.tokenizer.decode(everything(data.validation).input_ids)
    mentioned = [{n for n in range(20) if f"document {n}:" in text} for text in (trained, held)]
    assert not mentioned[0] & mentioned[1]
    assert len(mentioned[1]) >= 3 and len(mentioned[0]) >= 15


def test_without_packing_a_row_holds_one_document(corpus, tmp_path):
    packed = prepare(str(corpus), "bytes", 32, 0.2, tmp_path / "cache")
    data = prepare(str(corpus), "bytes", 32, 0.2, tmp_path / "cache", pack=False)
    assert (packed.documents, packed.tokens) == (data.documents, data.tokens)
    assert packed.fingerprint != data.fingerprint
    summary = data.summary()
    assert (summary["train_rows"], summary["validation_rows"]) == (len(data.train), len(data.validation))
    texts = [data.tokenizer.decode(row) for row in everything(data.train).input_ids]
    assert all(text.count("document") <= 1 for text in texts)
    starts = [text for text in texts if text.startswith("document")]
    assert len(starts) == 16
    rest = 1 - sum(len(text) + (len(text) < 32) for text in texts) / (32 * len(texts))
    assert summary["padding"] == pytest.approx(rest) and 0 < rest < 1
    assert packed.summary()["padding"] == 0


def test_a_validation_set_that_is_too_small_is_called_one(tmp_path):
    (tmp_path / "a.txt").write_text("short")
    for limit, pack, words, hint in (
        (
            None,
            True,
            "this validation set has 6 tokens, but one row needs 64",
            "add text to this validation set",
        ),
        (1, True, "this validation set has 6 tokens", "raise limit, or add text to this validation set"),
    ):
        with pytest.raises(DstrainError) as refused:
            prepare(
                str(tmp_path / "a.txt"),
                "bytes",
                64,
                0,
                tmp_path / "cache",
                pack,
                limit=limit,
                use="validation",
            )
        assert words in refused.value.message and refused.value.hint == hint
    (tmp_path / "ids.jsonl").write_text('{"input_ids": [7]}\n')
    with pytest.raises(DstrainError, match="no document of this validation set has two tokens") as refused:
        prepare(str(tmp_path / "ids.jsonl"), "bytes", 64, 0, tmp_path / "cache", pack=False, use="validation")
    assert refused.value.hint == "add text to this validation set"
    data = [{"path": str(tmp_path / "a.txt"), "validation": "b.txt"}]
    config = load_config(recipe=None, config_file=None, settings=(), flags={"data": data}).config
    asked = [
        part.request(config, tokenizer="bytes", cache_dir=tmp_path, own=None) for part in data_parts(config)
    ]
    assert [request.get("use") for request in asked] == [None, "validation"]


def test_documents_shorter_than_a_row_are_enough_without_packing(tmp_path):
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(DstrainError, match="one row needs 64"):
        prepare(str(tmp_path / "a.txt"), "bytes", 64, 0, tmp_path / "cache")
    data = prepare(str(tmp_path / "a.txt"), "bytes", 64, 0, tmp_path / "cache", pack=False)
    assert len(data.train) == 1 and data.train.label_tokens(np.array([0])).tolist() == [5]
    (tmp_path / "b.txt").write_text("ab")
    with pytest.raises(DstrainError, match="nothing to predict"):
        prepare(str(tmp_path / "b.txt"), "bytes", 64, 0.5, tmp_path / "cache", pack=False)


def test_a_second_call_tokenizes_nothing_whatever_its_rows(corpus, tmp_path, builds):
    first = prepare(str(corpus), "bytes", 32, 0, tmp_path / "cache")
    again = prepare(str(corpus), "bytes", 32, 0, tmp_path / "cache")
    other = prepare(str(corpus), "bytes", 16, 0.2, tmp_path / "cache")
    assert len(builds) == 1
    assert first.summary() == again.summary()
    assert other.fingerprint != first.fingerprint
    left = sorted(path.name for path in (tmp_path / "cache").iterdir())
    assert len(left) == 2 and left[1] == f"{left[0]}.lock"


def test_the_fingerprint_is_of_the_content(corpus, tmp_path):
    first = prepare(str(corpus), "bytes", 32, 0.2, tmp_path / "cache")
    moved = corpus.rename(tmp_path / "moved")
    for path in moved.iterdir():
        os.utime(path, (1, 1))
    assert prepare(str(moved), "bytes", 32, 0.2, tmp_path / "other").fingerprint == first.fingerprint
    for validation, seq_len in [(0.3, 32), (0.2, 31)]:
        assert (
            prepare(str(moved), "bytes", seq_len, validation, tmp_path / "other").fingerprint
            != first.fingerprint
        )


def test_a_changed_file_is_tokenized_anew(corpus, tmp_path, builds):
    first = prepare(str(corpus), "bytes", 32, 0, tmp_path / "cache")
    path = corpus / "07.txt"
    path.write_text(path.read_text().replace("abc", "xyz"))
    os.utime(path, ns=(1, 10**18))
    second = prepare(str(corpus), "bytes", 32, 0, tmp_path / "cache")
    assert len(builds) == 2
    assert second.fingerprint != first.fingerprint
    assert "xyz" in second.tokenizer.decode(everything(second.train).input_ids)


def damage_truncate(folder):
    os.truncate(folder / "tokens.bin", 10)


def damage_zero(folder):
    size = (folder / "tokens.bin").stat().st_size
    (folder / "tokens.bin").write_bytes(bytes(size))


def damage_lengths(folder):
    (folder / "lengths.npy").write_bytes(b"")


def damage_meta(folder):
    (folder / "meta.json").write_text('{"format": 1')


def damage_keys(folder):
    (folder / "meta.json").write_text('{"format": 1}')


def damage_remove(folder):
    (folder / "tokens.bin").unlink()


def damage_replace(folder):
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    folder.write_text("a file in the folder's place")


@pytest.mark.parametrize(
    "damage",
    [damage_truncate, damage_zero, damage_lengths, damage_meta, damage_keys, damage_remove, damage_replace],
)
def test_a_damaged_cache_is_noticed_and_built_anew(corpus, tmp_path, builds, damage):
    cache = tmp_path / "cache"
    first = prepare(str(corpus), "bytes", 32, 0, cache)
    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    rows = everything(first.train).input_ids.copy()
    (cache / f"{folder.name}.0.part").mkdir()  # as a killed process leaves it
    damage(folder)
    again = prepare(str(corpus), "bytes", 32, 0, cache)
    assert len(builds) == 2
    assert np.array_equal(everything(again.train).input_ids, rows)
    assert sorted(path.name for path in cache.iterdir()) == [folder.name, f"{folder.name}.lock"]


def test_large_caches_are_checked_in_samples(tmp_path):
    path = tmp_path / "big"
    path.write_bytes(bytes(5 << 20))
    before = token_cache._check(path)
    with open(path, "r+b") as stream:
        stream.seek(-100, os.SEEK_END)
        stream.write(b"x")
    assert token_cache._check(path) != before


def test_threads_without_file_locks_still_agree(corpus, tmp_path, monkeypatch):
    """On a file system that knows no locks several processes build at once; the first rename wins."""
    import errno

    def no_locks(stream, how):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr("fcntl.flock", no_locks)
    (tmp_path / "local").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "local"))
    barrier = threading.Barrier(3)
    real = token_cache._name
    monkeypatch.setattr(token_cache, "_name", lambda *args: (barrier.wait(timeout=60), real(*args)))
    summaries = []

    def work():
        summaries.append(prepare(str(corpus), "bytes", 32, 0, tmp_path / "cache").summary())

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(summaries) == 3 and summaries[0] == summaries[1] == summaries[2]
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 1
    assert list((tmp_path / "local").iterdir()) == []


def test_a_second_process_waits_and_says_so(corpus, tmp_path, monkeypatch, builds, capsys):
    monkeypatch.setattr("dstrain.shared_caches._SAY_SECONDS", 0.1)
    real = token_cache._name
    monkeypatch.setattr(token_cache, "_name", lambda *args: (time.sleep(1), real(*args)))
    found = []

    def work():
        found.append(prepare(str(corpus), "bytes", 32, 0, tmp_path / "cache").fingerprint)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1 and len(found) == 3 and len(set(found)) == 1
    assert capsys.readouterr().err.count("another process is tokenizing") == 2


@pytest.mark.parametrize(
    ("text", "seq_len", "validation", "words", "advice"),
    [
        ("abc", 8, 0, "4 tokens, but one row needs 8", "set seq_len to 4 or less"),
        ("a" * 99, 90, 0.5, "100 tokens (50 of them to train on)", "set seq_len to 50 or less"),
        ("a" * 99, 20, 0.05, "holds back 5 tokens", "set validation to 0.2, set validation to 0 (none)"),
        ("a" * 99, 60, 0.4, "holds back 40 tokens", "set validation to 0 (none)"),
        ("a" * 99, 0, 0, "seq_len is 0", None),
        ("a" * 99, 8, 1, "validation is 1", "0.01 holds back"),
        ("a" * 99, 8, -0.1, "validation is -0.1", "0.01 holds back"),
        ("a" * 99, 8, float("nan"), "validation is nan", "0.01 holds back"),
    ],
)
def test_too_little_text_and_senseless_shares_are_refused(tmp_path, text, seq_len, validation, words, advice):
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(DstrainError) as caught:
        prepare(str(tmp_path / "a.txt"), "bytes", seq_len, validation, tmp_path / "cache")
    assert words in caught.value.message
    assert advice is None or advice in caught.value.hint


@pytest.mark.parametrize("content", ["\n\n", '{"text": ""}\n'])
def test_a_source_of_empty_documents_is_refused(tmp_path, content):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(DstrainError, match="no text in this source"):
        prepare(str(path), "bytes", 8, 0, tmp_path / "cache")


def test_a_file_that_changes_while_it_is_read_is_noticed(corpus, tmp_path, monkeypatch):
    real = token_cache.write_tokens

    def meddle(*args):
        (corpus / "00.txt").write_text("changed meanwhile")
        return real(*args)

    monkeypatch.setattr(token_cache, "write_tokens", meddle)
    with pytest.raises(DstrainError, match="changed while"):
        prepare(str(corpus), "bytes", 8, 0, tmp_path / "cache")


def test_a_cache_folder_that_can_not_be_made_is_refused(corpus, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DstrainError, match="token cache can't be used"):
        prepare(str(corpus), "bytes", 8, 0, tmp_path / "cache")


def test_a_full_disk_is_said(corpus, tmp_path, monkeypatch):
    import errno

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device", "tokens.bin")

    monkeypatch.setattr(token_cache, "write_tokens", full)
    with pytest.raises(DstrainError, match="No space left") as caught:
        prepare(str(corpus), "bytes", 8, 0, tmp_path / "cache")
    assert "MB" in caught.value.hint


def test_a_hugging_face_tokenizer_without_the_network(corpus, tmp_path, monkeypatch):
    import socket

    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[UNK]", "<end>", "document", "abc", ":", *map(str, range(20))]
    backend = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / "words"
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="<end>").save_pretrained(
        folder
    )

    def refuse(*args):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    data = prepare(str(corpus), str(folder), 5, 0, tmp_path / "cache")
    batch = data.train.rows(np.array([0]))
    first = [words.index(word) for word in ["document", "0", ":", "<end>", "document"]]
    assert batch.input_ids.tolist() == [first]
    assert batch.labels.tolist() == [[*first[1:4], IGNORED, words.index("1")]]
    assert data.summary()["vocab_size"] == len(words)
    assert data.summary()["tokens"] == 20 * 4 + sum(range(20))
