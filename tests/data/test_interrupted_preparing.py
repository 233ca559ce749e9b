"""Whoever is interrupted while a corpus is tokenized goes on where he was, and ends with the same files."""

from __future__ import annotations

import gzip
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from dstrain.data.chat import corpus as corpus_module
from dstrain.data.chat.corpus import Corpus, source_of
from dstrain.data.chat.options import RecordOptions
from dstrain.data.listing.sources import find_files
from dstrain.data.reading.own_documents import OwnSource, hash_documents
from dstrain.data.token_cache import load_or_build
from dstrain.data.tokenizing import encoders, token_output
from dstrain.data.tokenizing.tokenizers import ByteTokenizer
from dstrain.errors import DstrainError
from dstrain.shared_caches import clear_leftovers


def text_of(seed: int, words: int) -> str:
    choice = random.Random(seed)
    return " ".join(choice.choice(["a", "model", "data\n", "naïve", "日本語", "2024"]) for _ in range(words))


def short_lines(folder: Path) -> Corpus:
    for part in range(3):
        lines = [json.dumps({"text": text_of(seed, seed % 9)}) for seed in range(part, 900, 3)]
        (folder / f"{part}.jsonl").write_text("\n".join(lines))
    (folder / "z.jsonl.gz").write_bytes(gzip.compress(b'{"text": "the last one"}\n'))
    return source_of(find_files(str(folder)), RecordOptions(on_bad_record="skip"), ByteTokenizer())


def long_documents(folder: Path) -> Corpus:
    for number in range(3):
        (folder / f"{number}.txt").write_text(text_of(number, 9000))
    return find_files(str(folder))


def conversations(folder: Path) -> Corpus:
    def turns(seed: int) -> list[dict[str, str]]:
        roles = ["user", "assistant"] * (1 + seed % 3)
        return [
            {"role": role, "content": f"so {text_of(seed + turn, 5)}."} for turn, role in enumerate(roles)
        ]

    lines = [json.dumps({"messages": turns(seed) if seed % 50 else []}) for seed in range(900)]
    (folder / "c.jsonl").write_text("\n".join(lines))
    return source_of(find_files(str(folder)), RecordOptions(on_bad_record="skip"), ByteTokenizer())


def texts_with_bad_ones(folder: Path) -> Corpus:
    lines = [json.dumps({"text": text_of(seed, 9) if seed % 50 else None}) for seed in range(900)]
    (folder / "t.jsonl").write_text("\n".join(lines[1:]))
    return source_of(find_files(str(folder)), RecordOptions(on_bad_record="skip"), ByteTokenizer())


def own_documents(folder: Path) -> Corpus:
    (folder / "mine.py").write_text(
        "def texts():\n    return (f'document {n} ' + 'abc ' * n for n in range(300))\n"
    )
    called: dict[str, Any] = {"name": "mine:texts", "options": {}, "folders": [str(folder)]}
    return OwnSource(**called, **hash_documents(**called))


MAKERS = [short_lines, long_documents, conversations, texts_with_bad_ones, own_documents]


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_output, "_SAVE_SECONDS", 0.0)
    monkeypatch.setattr(encoders, "_BATCH", 2**12)
    monkeypatch.setattr(encoders, "_PIECE", 2**10)
    monkeypatch.setattr(corpus_module, "_BATCH", 2**12)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def interrupt(monkeypatch: pytest.MonkeyPatch, after: int) -> list[int]:
    """Ctrl-C comes behind that many blocks; the blocks that were written are counted."""
    written: list[int] = []
    real = token_output.TokenOutput.write

    def write(self: token_output.TokenOutput, tokens: np.ndarray, *others: Any) -> None:
        if len(written) == after:
            raise KeyboardInterrupt
        written.append(tokens.size)
        real(self, tokens, *others)

    monkeypatch.setattr(token_output.TokenOutput, "write", write)
    return written


@pytest.mark.parametrize("make", MAKERS)
def test_it_goes_on_where_it_was(
    make: Callable[[Path], Corpus],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "corpus").mkdir()
    corpus = make(tmp_path / "corpus")
    whole = load_or_build(corpus, ByteTokenizer(), tmp_path / "whole")
    total, runs = [], 0
    while True:
        with monkeypatch.context() as context:
            total.append(interrupt(context, 2 + runs % 3))
            runs += 1
            try:
                found = load_or_build(corpus, ByteTokenizer(), tmp_path / "cache", workers=0)
                break
            except KeyboardInterrupt:
                assert capsys.readouterr().err.count("goes on where it was interrupted") == (runs > 1)
    assert runs > 3
    assert files_of(found.folder) == files_of(whole.folder)
    assert sum(map(sum, total)) == whole.stream.size, "no token was made twice"
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [
        found.folder.name,
        f"{found.folder.name}.lock",
    ]


def unfinished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int = 3) -> tuple[Corpus, Path]:
    (tmp_path / "corpus").mkdir()
    corpus = short_lines(tmp_path / "corpus")
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        interrupt(context, after)
        load_or_build(corpus, ByteTokenizer(), tmp_path / "cache")
    [folder] = (tmp_path / "cache").glob("*.unfinished")
    return corpus, folder


def cut(folder: Path) -> None:
    with open(folder / "tokens.bin", "r+b") as stream:
        stream.truncate(1000)


def change(folder: Path) -> None:
    with open(folder / "tokens.bin", "r+b") as stream:
        stream.write(b"\xff\xff")


def grow(folder: Path) -> None:
    with open(folder / "tokens.bin", "ab") as stream:
        stream.write(b"half written")


def no_state(folder: Path) -> None:
    (folder / "unfinished.json").unlink()


def half_a_state(folder: Path) -> None:
    text = (folder / "unfinished.json").read_text()
    (folder / "unfinished.json").write_text(text[: len(text) // 2])


def another_version(folder: Path) -> None:
    state = json.loads((folder / "unfinished.json").read_text())
    state["versions"][0] = "0.0"
    (folder / "unfinished.json").write_text(json.dumps(state))


def others_may_write(folder: Path) -> None:
    folder.chmod(0o777)


def a_link(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to(folder.with_name("elsewhere"))


@pytest.mark.parametrize(
    ("damage", "goes_on"),
    [
        (grow, True),
        *((damage, False) for damage in (cut, change, no_state, half_a_state, another_version)),
        *((damage, False) for damage in (others_may_write, a_link)),
    ],
)
def test_nothing_half_written_is_used(
    damage: Callable[[Path], None],
    goes_on: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    corpus, folder = unfinished(tmp_path, monkeypatch)
    whole = load_or_build(corpus, ByteTokenizer(), tmp_path / "whole")
    damage(folder)
    written = interrupt(monkeypatch, -1)
    found = load_or_build(corpus, ByteTokenizer(), tmp_path / "cache")
    assert files_of(found.folder) == files_of(whole.folder)
    assert (sum(written) < whole.stream.size) == goes_on


def test_a_changed_file_is_tokenized_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus, _ = unfinished(tmp_path, monkeypatch)
    with open(tmp_path / "corpus" / "0.jsonl", "a") as stream:
        stream.write('\n{"text": "more"}')
    written = interrupt(monkeypatch, -1)
    found = load_or_build(find_files(corpus.name), ByteTokenizer(), tmp_path / "cache")
    assert sum(written) == found.stream.size


def test_an_error_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "corpus").mkdir()
    short_lines(tmp_path / "corpus")
    with open(tmp_path / "corpus" / "2.jsonl", "a") as stream:
        stream.write("\nno JSON")
    with pytest.raises(DstrainError, match="not JSON"):
        load_or_build(find_files(str(tmp_path / "corpus")), ByteTokenizer(), tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.unfinished"))


def test_what_nobody_goes_on_with_is_removed_after_a_week(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = unfinished(tmp_path, monkeypatch)
    clear_leftovers(tmp_path)
    assert folder.is_dir()
    monkeypatch.setattr("dstrain.shared_caches._KEPT_HOURS", -1)
    clear_leftovers(tmp_path)
    assert not folder.exists()


def killed_at_random(
    corpus: Corpus, cache: Path, workers: int, records: str, times: int, seed: int
) -> Iterator[str]:
    """Runs that are killed at random moments, then one that is not: its answer."""
    draw = random.Random(seed)
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "tests.support.interrupted_preparing", corpus.name, "bytes"]
    for number in range(times + 1):
        with subprocess.Popen(
            [*command, str(cache), str(workers), records], stdout=subprocess.PIPE, text=True, cwd=root
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "begins\n"
            if number < times:
                workers_of = psutil.Process(process.pid).children(recursive=True)
                try:
                    process.wait(timeout=draw.uniform(0.0, 0.6))
                except subprocess.TimeoutExpired:
                    process.kill()
                process.wait()
                assert not psutil.wait_procs(workers_of, timeout=30)[1]
            else:
                yield process.stdout.read().strip()


def check_kills(tmp_path: Path, make: Callable[[Path], Corpus], workers: int, times: int) -> None:
    (tmp_path / "corpus").mkdir()
    corpus = make(tmp_path / "corpus")
    whole = load_or_build(corpus, ByteTokenizer(), tmp_path / "whole")
    records = json.dumps({"on_bad_record": "skip"})
    [content] = killed_at_random(corpus, tmp_path / "cache", workers, records, times, seed=times)
    assert content == whole.content
    assert files_of(tmp_path / "cache" / whole.folder.name) == files_of(whole.folder)
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [
        whole.folder.name,
        f"{whole.folder.name}.lock",
    ]


def test_killed_at_any_moment(tmp_path: Path) -> None:
    check_kills(tmp_path, short_lines, workers=2, times=4)


@pytest.mark.torture
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("make", [short_lines, long_documents, conversations])
def test_killed_many_times(tmp_path: Path, make: Callable[[Path], Corpus], workers: int) -> None:
    check_kills(tmp_path, make, workers, times=20)
    shutil.rmtree(tmp_path)
