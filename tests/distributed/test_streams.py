"""Streams of several ranks: one ring for each host, the same state on all, and hosts that must make the same rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import distributed

from dstrain.data.rows.mixture import RowsInOrder
from dstrain.data.rows.packing import Rows
from dstrain.data.streaming.prepare import StreamedData
from dstrain.data.streaming.stream import Stream, StreamRequest
from dstrain.data.training_data import TrainingData, TrainingSource, training_data
from dstrain.errors import DstrainError
from tests.support.distributed.workers import run

GLOBAL_BATCH = 8


def write_texts(folder: Path, letter: str = "x") -> None:
    folder.mkdir()
    for shard in range(3):
        texts = [f"{shard}.{number} {letter * (number % 20)}" for number in range(40)]
        (folder / f"{shard}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))


def data_in(folder: Path) -> TrainingData:
    from dstrain.data.streaming.rows import StreamRows

    request = StreamRequest(str(folder), "bytes", 32, 5, window=10)
    stream = Stream.open(request)
    held: Rows | None = None
    streamed = StreamedData(StreamRows(request, stream.fingerprint), held, stream.tokenizer)
    return training_data([TrainingSource("texts", streamed)])


def on_hosts(monkeypatch: pytest.MonkeyPatch, hosts: int) -> None:
    """As if the ranks were on so many machines."""
    from dstrain.train import streams

    monkeypatch.setattr(streams, "_host", lambda: f"host {distributed.get_rank() % hosts}")
    monkeypatch.setattr(streams.socket, "gethostname", lambda: f"host-{distributed.get_rank() % hosts}")


def take(rank: int, cache: str, folder: str, hosts: int, states: Any, first: int, last: int) -> Any:
    """The rows of some steps, the states after them, and how many rings there were."""
    from dstrain.train.streams import Streams

    with pytest.MonkeyPatch.context() as patch:
        on_hosts(patch, hosts)
        data = data_in(Path(folder))
        order = RowsInOrder(GLOBAL_BATCH)
        seen = []
        with Streams(data, order, Path(cache)) as streams:
            streams.open(states)
            rings = len(list(Path(cache).glob("*.part")))
            for step in range(first, last + 1):
                ids = order.sample_ids(step)
                data.rows.label_tokens(ids)
                seen.append(data.rows.rows(ids).input_ids.tolist())
            found = streams.states(last)
            distributed.barrier()
    return seen, found, rings


@pytest.mark.parametrize("hosts", [1, 2])
def test_a_ring_a_host_and_one_state(tmp_path: Path, hosts: int) -> None:
    write_texts(tmp_path / "texts")
    cache = str(tmp_path / "cache")
    whole = run(3, take, cache, str(tmp_path / "texts"), hosts, None, 1, 6)
    assert [rings for _, _, rings in whole] == [hosts] * 3
    rows = [seen for seen, _, _ in whole]
    assert rows[0] == rows[1] == rows[2]
    first = run(2, take, cache, str(tmp_path / "texts"), 1, None, 1, 3)
    rest = run(4, take, cache, str(tmp_path / "texts"), hosts, first[0][1], 4, 6)
    for seen, _, _ in rest:
        assert first[0][0] + seen == rows[0]
    assert list(Path(cache).iterdir()) == []


def take_from_own(rank: int, cache: str, folder: str) -> str:
    """Each rank is a host with files of its own, of the same names and sizes."""
    try:
        take(rank, cache, f"{folder}{rank}", 2, None, 1, 2)
    except DstrainError as error:
        return str(error)
    return "no error"


def test_hosts_whose_files_differ_are_told_of(tmp_path: Path) -> None:
    write_texts(tmp_path / "texts0")
    write_texts(tmp_path / "texts1", letter="y")
    for said in run(2, take_from_own, str(tmp_path / "cache"), str(tmp_path / "texts")):
        assert said.startswith("host-1 has made other rows of the data than host-0")


def refused_states(rank: int, cache: str, folder: str) -> str:
    from dstrain.train.streams import Streams

    data = data_in(Path(folder))
    with pytest.raises(DstrainError) as refused:
        Streams(data, RowsInOrder(GLOBAL_BATCH), Path(cache)).open([None, None])
    return str(refused.value)


def test_states_of_other_sources(tmp_path: Path) -> None:
    write_texts(tmp_path / "texts")
    [said] = run(1, refused_states, str(tmp_path / "cache"), str(tmp_path / "texts"))
    assert said.startswith("the checkpoint knows places in 2 sources, and there are 1")


def without_streams(rank: int, cache: str) -> Any:
    from dstrain.data.rows.packing import PackedRows, TokenStream
    from dstrain.train.streams import Streams

    tokens = np.arange(100, dtype=np.uint16)
    rows = PackedRows(TokenStream(tokens, np.array([0]), np.array([100])), 10)
    data = TrainingData((), (), rows, ())
    with Streams(data, RowsInOrder(GLOBAL_BATCH), Path(cache)) as streams:
        streams.open(None)
        return streams.states(3)


def test_a_run_without_streams_has_none(tmp_path: Path) -> None:
    assert run(1, without_streams, str(tmp_path / "cache")) == [None]
    assert not (tmp_path / "cache").exists()
