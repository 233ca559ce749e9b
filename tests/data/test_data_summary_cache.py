"""What is kept of prepared data: read again while nothing has changed, and passed over as soon as anything has."""

import json
import os
import shutil

import pytest

from dstrain.data.dataset_summary_cache import (
    TOKEN_FILES,
    keep_summary,
    read_summary,
    summary_file,
    tokenizer_state,
)
from dstrain.data.listing.sources import find_files
from dstrain.data.prepare import main
from dstrain.errors import DstrainError

CHOICES = {"seq_len": 16, "validation": 0.25, "pack": True, "begin": "auto"}


@pytest.fixture
def corpus(tmp_path):
    """A folder of four texts."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.txt").write_text(f"text number {number}. " * 9)
    return folder


def prepared(tmp_path, source, **changes):
    """Prepare it in the way of the command line; the summary that this gives."""
    request = {"source": str(source), "tokenizer": "bytes", "cache_dir": str(tmp_path / "cache")}
    (tmp_path / "request.json").write_text(json.dumps(request | CHOICES | changes))
    assert main([str(tmp_path / "request.json"), str(tmp_path / "out.json")]) == 0
    return json.loads((tmp_path / "out.json").read_text())


def looked_up(tmp_path, source, **changes):
    file = summary_file(
        tmp_path / "cache", find_files(str(source)), tokenizer_state("bytes"), **CHOICES | changes
    )
    return read_summary(file)


def test_what_was_found_out_once_is_read_again(tmp_path, corpus):
    assert looked_up(tmp_path, corpus) is None
    summary = prepared(tmp_path, corpus)
    assert summary["files"] == 4
    assert looked_up(tmp_path, corpus) == summary
    assert looked_up(tmp_path, corpus / "0.txt") is None


def grown(corpus):
    with (corpus / "1.txt").open("a") as file:
        file.write("more")


def touched(corpus):
    os.utime(corpus / "1.txt", ns=(1, 1))


def added(corpus):
    (corpus / "a").mkdir()
    (corpus / "a" / "9.txt").write_text("nine")


def removed(corpus):
    (corpus / "3.txt").unlink()


def renamed(corpus):
    (corpus / "3.txt").rename(corpus / "5.txt")


@pytest.mark.parametrize("change", [grown, touched, added, removed, renamed])
def test_another_source_has_another_summary(tmp_path, corpus, change):
    prepared(tmp_path, corpus)
    change(corpus)
    assert looked_up(tmp_path, corpus) is None


@pytest.mark.parametrize("change", [{"seq_len": 8}, {"validation": 0.0}, {"pack": False}])
def test_other_choices_have_another_summary_of_the_same_tokens(tmp_path, corpus, change):
    first = prepared(tmp_path, corpus)
    assert looked_up(tmp_path, corpus, **change) is None
    second = prepared(tmp_path, corpus, **change)
    assert looked_up(tmp_path, corpus, **change) == second != first
    assert looked_up(tmp_path, corpus) == first


@pytest.mark.parametrize("name", TOKEN_FILES)
@pytest.mark.parametrize("change", ["gone", "shorter", "other bytes"])
def test_a_summary_of_tokens_that_changed_is_passed_over(tmp_path, corpus, name, change):
    summary = prepared(tmp_path, corpus)
    (path,) = (tmp_path / "cache").glob(f"*/{name}")
    if change == "gone":
        path.unlink()
    else:
        content, before = path.read_bytes(), path.stat()
        path.write_bytes(content[:-1] if change == "shorter" else content[:-1] + b"\0")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # no help to whoever hides it
    assert looked_up(tmp_path, corpus) is None
    assert prepared(tmp_path, corpus) == summary  # made whole again, and known again
    assert looked_up(tmp_path, corpus) == summary


def test_a_cache_that_was_cleared_is_passed_over(tmp_path, corpus):
    prepared(tmp_path, corpus)
    (tokens,) = (tmp_path / "cache").glob("*/tokens.bin")
    shutil.rmtree(tokens.parent)
    assert looked_up(tmp_path, corpus) is None


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"tokens": 1}', b'{"tokens": "x", "state": 0}', b"\xff"]
)
def test_a_spoilt_summary_is_passed_over(tmp_path, corpus, content):
    prepared(tmp_path, corpus)
    (file,) = (tmp_path / "cache" / "summaries").iterdir()
    file.write_bytes(content)
    assert looked_up(tmp_path, corpus) is None


def test_another_dstrain_has_another_summary(tmp_path, corpus, monkeypatch):
    prepared(tmp_path, corpus)
    monkeypatch.setattr("dstrain.data.dataset_summary_cache.__version__", "0.0.0")
    assert looked_up(tmp_path, corpus) is None


def test_a_cache_that_can_not_be_written_is_no_error(tmp_path, corpus):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "summaries").write_text("a file stands where the folder belongs")
    prepared(tmp_path, corpus)
    assert looked_up(tmp_path, corpus) is None
    keep_summary(tmp_path / "none" / "x.json", tmp_path / "no tokens", {})
    assert read_summary(tmp_path / "none" / "x.json") is None


def test_a_tokenizer_is_known_by_its_name_and_by_the_model_that_may_name_its_class(tmp_path):
    """A summary says the name, so a folder that was moved has another one."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    before = tokenizer_state(str(folder))
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    with_model = tokenizer_state(str(folder))
    folder.rename(tmp_path / "moved")
    assert before != with_model != tokenizer_state(str(tmp_path / "moved"))


def test_a_tokenizer_is_known_by_its_files(tmp_path, monkeypatch):
    folder = tmp_path / "tokenizer"
    with pytest.raises(DstrainError, match="no tokenizer folder"):
        tokenizer_state(str(folder))
    folder.mkdir()
    with pytest.raises(DstrainError, match="no tokenizer in this folder"):
        tokenizer_state(str(folder))
    (folder / "vocab.json").write_text("{}")
    states = [tokenizer_state(str(folder))]
    monkeypatch.setattr("importlib.metadata.version", lambda package: "0.0.0")
    states.append(tokenizer_state(str(folder)))
    (folder / "tokenizer_config.json").write_text("{}")
    states.append(tokenizer_state(str(folder)))
    (folder / "README.md").write_text("decides nothing")
    assert tokenizer_state(str(folder)) == states[-1]
    assert all(states.count(state) == 1 for state in states)
