"""Documents from the user's own code: hashed, cached by their content, and refused where they are none."""

import dataclasses
import json
import os
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from dstrain.data.prepare import prepare
from dstrain.data.reading import own_documents
from dstrain.data.reading.own_documents import OwnSource, hash_documents, read_own_documents
from dstrain.errors import DstrainError

FOLDER = Path(__file__).parents[1] / "support" / "own_code"


def source_of(name, **options):
    called = {"name": f"own_datasets:{name}", "options": options, "folders": [str(FOLDER)]}
    return OwnSource(**called, **hash_documents(**called))


def test_it_gives_the_rows_that_the_same_texts_in_a_file_give(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": f"Zeile {number} ä " * number}) + "\n" for number in range(30))
    )
    by_file = prepare(str(tmp_path / "a.jsonl"), "bytes", 32, 0.2, tmp_path / "cache")
    own = source_of("lines", file=str(tmp_path / "a.jsonl"))
    by_code = prepare(own, "bytes", 32, 0.2, tmp_path / "cache")
    assert by_code.fingerprint == by_file.fingerprint
    for one, other in ((by_code.train, by_file.train), (by_code.validation, by_file.validation)):
        numbers = np.arange(len(other))
        assert np.array_equal(one.rows(numbers).input_ids, other.rows(numbers).input_ids)
    kept = by_code.summary()
    assert (kept["source"], kept["files"], kept["documents_hash"]) == ("own_datasets:lines", 0, own.content)
    assert kept["bytes"] == kept["tokens"] - kept["documents"]
    assert by_file.summary()["documents_hash"] == ""


def test_the_content_alone_decides_what_is_tokenized(tmp_path, builds):
    first = prepare(source_of("numbered"), "bytes", 32, 0, tmp_path / "cache")
    for same in (source_of("numbered", count=40), source_of("Numbered")):
        assert prepare(same, "bytes", 16, 0.1, tmp_path / "cache").tokens == first.tokens
    assert len(builds) == 1
    assert prepare(source_of("numbered", count=41), "bytes", 32, 0, tmp_path / "cache").tokens > first.tokens
    assert len(builds) == 2


def test_the_code_is_not_called_where_the_tokens_are_known(tmp_path):
    log = tmp_path / "calls"
    own = source_of("numbered", log=str(log))
    first = prepare(own, "bytes", 32, 0, tmp_path / "cache")
    assert len(log.read_text().splitlines()) == 2
    gone = dataclasses.replace(own, folders=(), name="nowhere_at_all:numbered")
    assert prepare(gone, "bytes", 32, 0, tmp_path / "cache").fingerprint == first.fingerprint
    assert len(log.read_text().splitlines()) == 2


def test_texts_with_other_borders_are_other_documents(monkeypatch):
    def content(*texts):
        monkeypatch.setattr(own_documents, "load_plugin", lambda *args, **options: lambda: list(texts))
        return hash_documents("a:b", {}, ())["content"]

    assert len({content(*texts) for texts in (("ab", "c"), ("a", "bc"), ("abc",), ("abc", ""))}) == 4
    assert content("ab", "c") == content("ab", "c")


def test_a_kind_of_str_is_taken_for_its_text(tmp_path):
    data = prepare(source_of("texts"), "bytes", 16, 0, tmp_path / "cache")
    assert "text 3" in data.tokenizer.decode(data.train.rows(np.arange(len(data.train))).input_ids)


def test_documents_are_not_held(monkeypatch):
    def many():
        yield from ("x" * 100_000 for _ in range(300))

    monkeypatch.setattr(own_documents, "load_plugin", lambda *args, **options: many)
    tracemalloc.start()
    assert hash_documents("a:b", {}, ())["bytes"] == 30_000_000
    assert tracemalloc.get_traced_memory()[1] < 3_000_000
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("broken", {"third": "raises"}, "failed at document 3: KeyError: 'no such row'"),
        ("broken", {"third": "exits"}, "failed at document 3: SystemExit: 0"),
        ("broken", {"third": "bytes"}, "document 3 is bytes, not a str"),
        ("broken", {"third": "none"}, "document 3 is None, not a str"),
        ("broken", {"third": "dict"}, "document 3 is a dict, not a str"),
        (
            "broken",
            {"third": "surrogate"},
            r"document 3: character 2 is half a surrogate pair (\ud800)",
        ),
        ("refuses", {"path": "x"}, "can't be called: FileNotFoundError: [Errno 2] No such file"),
        ("one_text", {}, "returned a str, not an iterable"),
        ("mapping", {}, "returned a dict, not an iterable"),
        ("later", {}, "returned an async_generator, not an iterable"),
        ("nothing", {}, "gave no documents"),
        ("DOCUMENTS", {}, "is a list, not a function or class"),
        ("numbered", {"rows": 3}, "data_options (rows): got an unexpected keyword argument 'rows'"),
        ("lines", {}, "data_options (none): missing a required argument: 'file'"),
        ("no_such", {}, "has no 'no_such'"),
    ],
)
def test_what_is_no_dataset_is_refused_with_its_name_and_the_reason(name, options, words, capsys):
    with pytest.raises(DstrainError) as caught:
        source_of(name, **options)
    assert f"dataset own_datasets:{name}" in caught.value.message and words in caught.value.message
    if words.startswith("failed"):
        assert caught.value.where.startswith(f"{FOLDER / 'own_datasets.py'}:")
        traceback = capsys.readouterr().err
        assert "own_datasets.py" in traceback and str(Path(own_documents.__file__)) not in traceback


def test_only_empty_documents_are_refused(tmp_path):
    with pytest.raises(DstrainError, match="own_datasets:empty: no text in this source: 2 documents"):
        prepare(source_of("empty"), "bytes", 16, 0, tmp_path / "cache")


def test_a_module_that_can_not_be_imported_is_told(tmp_path, capsys):
    (tmp_path / "ends_at_once.py").write_text("import sys\nprint('hello')\nsys.exit('no licence')\n")
    with pytest.raises(
        DstrainError, match="dataset ends_at_once:x can't be imported: SystemExit: no licence"
    ):
        hash_documents("ends_at_once:x", {}, [str(tmp_path)])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["at_random", "grown"])
def test_other_documents_the_second_time_are_refused_and_not_kept(name, tmp_path):
    (tmp_path / "count").write_text("30")
    options = {"file": str(tmp_path / "count")} if name == "grown" else {}
    with pytest.raises(DstrainError, match=f"{name} gave other documents when it was called again") as caught:
        prepare(source_of(name, **options), "bytes", 16, 0, tmp_path / "cache")
    assert "the same documents in the same order" in caught.value.hint
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_what_it_prints_goes_to_standard_error(capsys):
    assert len(list(read_own_documents(source_of("numbered")))) == 40
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("to standard output") == 2


def test_threads_and_processes_at_once_share_the_work(tmp_path):
    log = tmp_path / "calls"
    own = source_of("numbered", log=str(log))
    request = {
        "source": own.name,
        "tokenizer": "bytes",
        "seq_len": 16,
        "validation": 0.1,
        "pack": True,
        "begin": "auto",
    }
    request |= {"pack": True, "begin": "auto", "cache_dir": str(tmp_path / "cache")}
    request["own"] = {key: getattr(own, key) for key in ("options", "folders", "content", "bytes")}
    (tmp_path / "request.json").write_text(json.dumps(request))
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "dstrain.data.prepare", "request.json", f"out{number}.json"],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for number in range(2)
    ]
    found = []

    def work():
        found.append(prepare(own, "bytes", 16, 0.1, tmp_path / "cache").summary())

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    found += [json.loads((tmp_path / f"out{number}.json").read_text()) for number in range(2)]
    assert all(summary == found[0] for summary in found) and len(found) == 4
    assert len(log.read_text().splitlines()) == 2, "read for the hash, and tokenized once"


def test_a_child_answers_with_the_error_whatever_is_printed(tmp_path):
    request = {
        "name": "own_datasets:broken",
        "options": {"third": "bytes"},
        "folders": [str(FOLDER)],
    }
    (tmp_path / "request.json").write_text(json.dumps(request))
    assert own_documents.main([str(tmp_path / "request.json"), str(tmp_path / "out.json")]) == 2
    told = json.loads((tmp_path / "out.json").read_text())["error"]
    assert told["message"] == "dataset own_datasets:broken: document 3 is bytes, not a str"
