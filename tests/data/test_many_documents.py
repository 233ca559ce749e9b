"""What is held in memory for each document: as little as for 10^8 of them, and the same rows and fingerprints."""

from __future__ import annotations

import hashlib
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from dstrain.data import prepare as prepare_module
from dstrain.data.prepare import prepare
from dstrain.data.rows import packing, split
from dstrain.data.rows.packing import IGNORED, PackedRows, TokenStream
from dstrain.data.rows.split import split_stream

DOCUMENTS = 200_000


def stream_of(documents: int, seed: int = 0) -> TokenStream:
    lengths = np.random.default_rng(seed).integers(1, 12, documents)
    tokens = np.arange(lengths.sum(), dtype=np.int64)
    return TokenStream(tokens, np.cumsum(lengths) - lengths, lengths)


@pytest.mark.parametrize("documents", [2, 3, 17, 5000])
@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.5, 0.999])
def test_those_held_back_are_the_first_by_their_hashes(monkeypatch, documents: int, fraction: float) -> None:
    monkeypatch.setattr(split, "_BLOCK", 7)
    stream = stream_of(documents)
    train, held = split_stream(stream, fraction)
    assert held is not None
    count = split._share(fraction, documents)
    first = np.sort(split._hash_order(documents)[:count])
    assert np.array_equal(held.starts, stream.starts[first]) and np.array_equal(
        held.lengths, stream.lengths[first]
    )
    rest = np.setdiff1d(np.arange(documents), first)
    assert np.array_equal(train.starts, stream.starts[rest])


@pytest.mark.parametrize("order", ["in order", "with gaps", "shuffled"])
def test_rows_are_those_of_a_plain_loop(monkeypatch, order: str) -> None:
    monkeypatch.setattr(packing, "_BLOCK", 5)
    stream = stream_of(300)
    rng = np.random.default_rng(1)
    chosen = {
        "in order": np.arange(300),
        "with gaps": np.flatnonzero(rng.random(300) < 0.7),
        "shuffled": rng.permutation(300),
    }[order]
    part = TokenStream(stream.tokens, stream.starts[chosen], stream.lengths[chosen])
    ids, places, labels = [], [], []
    for start, length in zip(part.starts.tolist(), part.lengths.tolist(), strict=True):
        ids += range(start, start + length)
        places += range(length)
        labels += [*range(start + 1, start + length), IGNORED]
    rows = PackedRows(part, 16)
    assert len(rows) == len(ids) // 16
    batch = rows.rows(np.arange(len(rows)))
    taken = len(rows) * 16
    assert batch.input_ids.ravel().tolist() == ids[:taken]
    assert batch.labels.ravel().tolist() == labels[:taken]
    begun = np.array(places[:taken]).reshape(-1, 16)
    assert (batch.position_ids == np.minimum(begun, np.arange(16))).all()
    assert rows.label_tokens(np.arange(len(rows))).tolist() == (batch.labels != IGNORED).sum(1).tolist()


@pytest.mark.parametrize("fraction", [0.0, 0.01])
def test_one_number_stays_for_each_document(fraction: float) -> None:
    """Eight bytes, and a little for each that was held back."""
    stream = stream_of(DOCUMENTS)
    tracemalloc.start()
    try:
        rows = PackedRows(split_stream(stream, fraction)[0], 64)
        lasting, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(rows) and lasting < 9 * DOCUMENTS
    assert peak < 45 * DOCUMENTS, "with starts and lengths of what is chosen, for as long as rows are made"


def test_the_fingerprint_is_of_all_numbers_at_once(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "text {n}"}}\n' for n in range(50)))
    monkeypatch.setattr(prepare_module, "_HASHED", 3)
    data = prepare(str(tmp_path / "a.jsonl"), "bytes", 16, 0.2, tmp_path / "cache")
    assert isinstance(data.lengths, np.memmap), "the ranks of a host share them"
    tokens = prepare_module.load_or_build(data.source, data.tokenizer, tmp_path / "cache")
    train, _ = split_stream(tokens.stream, 0.2)
    whole = hashlib.sha256(f"{tokens.content} 16".encode() + train.starts.tobytes() + train.lengths.tobytes())
    assert data.fingerprint == whole.hexdigest()[:32]
