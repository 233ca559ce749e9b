"""A corpus is tokenized by any number of workers to the same files, and refused with the same words."""

from __future__ import annotations

import gzip
import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dstrain.data.chat.corpus import Corpus, source_of
from dstrain.data.chat.options import RecordOptions
from dstrain.data.listing.sources import find_files
from dstrain.data.token_cache import load_or_build, worth_starting
from dstrain.data.tokenizing import encoders
from dstrain.data.tokenizing import text_writer as token_writer
from dstrain.data.tokenizing.tokenizers import load_tokenizer
from dstrain.errors import DstrainError
from tests.support.worker_jobs import DyingWork

WORDS = ["the", "model", "data", "naïve", "日本語", "x = 1", "\n\n", "  ", "don't", "🙂", "2024"]


def words(seed: int, count: int) -> str:
    choice = random.Random(seed)
    return " ".join(choice.choice(WORDS) for _ in range(count))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<s>", "</s>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([words(seed, 200) for seed in range(20)], trainer)
    folder = str(tmp_path_factory.mktemp("tokenizer"))
    whole = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", extra_special_tokens=["<|im_end|>"]
    )
    whole.save_pretrained(folder)
    return folder


def short_lines(folder: Path) -> RecordOptions:
    lines = [json.dumps({"text": words(seed, seed % 40)}) for seed in range(3000)]
    (folder / "a.jsonl").write_text("\n".join(lines))
    return RecordOptions()


def long_documents(folder: Path) -> RecordOptions:
    for number in range(3):
        (folder / f"{number}.txt").write_text(words(number, 60_000))
    (folder / "packed.jsonl.gz").write_bytes(
        gzip.compress(json.dumps({"text": words(7, 50_000)}).encode() + b'\n{"text": ""}\n{"text": "end"}')
    )
    (folder / "empty.txt").write_text("")
    return RecordOptions()


def chats(folder: Path) -> RecordOptions:
    lines = []
    for seed in range(1500):
        turns = [
            {"role": role, "content": f"so {words(10 * seed + turn, 1 + seed % 20)}."}
            for turn, role in enumerate(["user", "assistant"] * (1 + seed % 3))
        ]
        lines.append(json.dumps({"messages": turns}) if seed % 100 else '{"messages": []}')
    (folder / "c.jsonl").write_text("\n".join(lines))
    return RecordOptions(chat_template="chatml", on_bad_record="skip")


def corpus_in(folder: Path, name: str, options: RecordOptions, begin: str = "always") -> tuple[Corpus, Any]:
    tokenizer = load_tokenizer(name, begin)
    return source_of(find_files(str(folder)), options, tokenizer), tokenizer


@pytest.mark.parametrize("make", [short_lines, long_documents, chats])
@pytest.mark.parametrize("kind", ["bytes", "folder"])
def test_the_files_do_not_depend_on_the_number_of_workers(
    tmp_path: Path,
    tokenizer: str,
    make: Callable[[Path], RecordOptions],
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "corpus").mkdir()
    options = make(tmp_path / "corpus")
    name, begin = (tokenizer, "always") if kind == "folder" else ("bytes", "auto")
    found = []
    for workers, batch in ((0, 2**19), (0, 2**14), (2, 2**15)):
        monkeypatch.setattr(encoders, "_BATCH", batch)
        corpus, loaded = corpus_in(tmp_path / "corpus", name, options, begin)
        tokens = load_or_build(corpus, loaded, tmp_path / f"cache{workers}{batch}", workers)
        found.append({path.name: path.read_bytes() for path in sorted(tokens.folder.iterdir())})
    assert found[0] == found[1] == found[2]
    assert {"meta.json", "tokens.bin", "lengths.npy"} <= found[0].keys()
    assert ("trained.bin" in found[0]) == ("skipped.txt" in found[0]) == (make is chats)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_first_bad_record_is_told_with_its_place(tmp_path: Path, tokenizer: str, workers: int) -> None:
    (tmp_path / "corpus").mkdir()
    chats(tmp_path / "corpus")
    lines = (tmp_path / "corpus" / "c.jsonl").read_text().splitlines()
    lines[0], lines[900], lines[1100] = lines[1], '{"messages": [{"role": "cat"}]}', "{bad"
    kept = [line for line in lines if line != '{"messages": []}']
    (tmp_path / "corpus" / "c.jsonl").write_text("\n".join(kept))
    corpus, loaded = corpus_in(tmp_path / "corpus", tokenizer, RecordOptions(chat_template="chatml"))
    with pytest.raises(DstrainError, match="cat") as caught:
        load_or_build(corpus, loaded, tmp_path / "cache", workers)
    line = 1 + kept.index('{"messages": [{"role": "cat"}]}')
    assert (caught.value.where or "").endswith(f"c.jsonl:{line}")
    assert "on_bad_record: skip" in (caught.value.hint or "")


def test_a_worker_that_is_killed_leaves_nothing_half_written(
    tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "corpus").mkdir()
    short_lines(tmp_path / "corpus")
    corpus, loaded = corpus_in(tmp_path / "corpus", tokenizer, RecordOptions())
    monkeypatch.setattr(token_writer, "TextEncoder", lambda tokenizer: DyingWork())
    with pytest.raises(DstrainError, match="was ended by SIGKILL"):
        load_or_build(corpus, loaded, tmp_path / "cache", 2)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]
    monkeypatch.undo()
    assert load_or_build(corpus, loaded, tmp_path / "cache", 0).stream.size


@pytest.mark.parametrize("kind", ["bytes", "folder"])
def test_a_tokenizer_that_was_sent_gives_the_same(tokenizer: str, kind: str) -> None:
    here = load_tokenizer(tokenizer if kind == "folder" else "bytes")
    there = pickle.loads(pickle.dumps(here))
    texts = [words(seed, 50) for seed in range(20)]
    for ids, others in zip(here.encode_batch(texts), there.encode_batch(texts), strict=True):
        assert np.array_equal(ids, others) and ids.dtype == others.dtype
    spelled = ["a</s>b", texts[0]]
    for one, other in zip(here.encode_with_places(spelled), there.encode_with_places(spelled), strict=True):
        assert all(map(np.array_equal, one, other))
    assert there.token_text([1, 5, 40]) == here.token_text([1, 5, 40])
    assert there.fingerprint == here.fingerprint


def test_few_bytes_start_no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dstrain.data.token_cache.available_cores", lambda: 8)
    assert [worth_starting(size) for size in (0, 1_000_000, 7_000_000)] == [0, 0, 0]
    assert worth_starting(12_000_000) == 3 and worth_starting(10**9) == 8
    monkeypatch.setattr("dstrain.data.token_cache.available_cores", lambda: 1)
    assert worth_starting(10**9) == 0
