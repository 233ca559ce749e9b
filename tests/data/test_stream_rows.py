"""The rows of a stream as training asks for them, from the process that makes them."""

import json
import os
import signal
import time
from itertools import islice

import numpy as np
import pytest

from dstrain.child_process import run_module
from dstrain.data.streaming import ring as ring_module
from dstrain.data.streaming.making import make_rows
from dstrain.data.streaming.ring import RingFolder, RingReader, RingWriter
from dstrain.data.streaming.rows import StreamRows
from dstrain.data.streaming.state import StreamState
from dstrain.data.streaming.stream import Stream, StreamRequest
from dstrain.errors import DstrainError
from dstrain.shared_caches import clear_leftovers
from tests.support.streaming.killed import children

SEQ_LEN = 32
STEP = 8


@pytest.fixture
def request_of(tmp_path):
    """A stream of some small files, whose blocks make a few rows each."""
    folder = tmp_path / "data"
    folder.mkdir()
    for shard in range(4):
        lines = [json.dumps({"text": f"{shard}.{n} " + "x" * (n % 40)}) for n in range(50)]
        (folder / f"{shard}.jsonl").write_text("\n".join(lines))
    return StreamRequest(str(folder), "bytes", SEQ_LEN, 5, window=10, characters=10_000)


@pytest.fixture
def expected(request_of):
    return rows_of(make_rows(Stream.open(request_of), StreamState()), 60)


def rows_of(made, groups):
    found, counts = {}, {}
    for one in islice(made, groups):
        batch = one.rows.rows(one.order)
        for at in range(one.order.size):
            found[one.state.first + at] = tuple(part[at].tolist() for part in batch)
            counts[one.state.first + at] = int((batch.labels[at] >= 0).sum())
    return found, counts


@pytest.fixture
def opened(request_of, tmp_path):
    """Makes `StreamRows`, and closes them."""
    found = []

    def opened(name="run", request=request_of, fingerprint=None, **choices):
        fingerprint = fingerprint or Stream.open(request).fingerprint
        rows = StreamRows(request, fingerprint).open(tmp_path / "cache" / "streams", name, **choices)
        found.append(rows)
        return rows

    yield opened
    for rows in found:
        rows.close()


def take(rows, step, expected):
    """The rows of a step, which are those that are expected."""
    contents, counts = expected
    ids = np.arange(step * STEP, (step + 1) * STEP)
    assert rows.label_tokens(ids).tolist() == [counts[row] for row in ids.tolist()]
    batch = rows.rows(ids)
    assert [array.dtype for array in batch] == [np.int64] * 3
    for at, row in enumerate(ids.tolist()):
        assert tuple(part[at].tolist() for part in batch) == contents[row]
    assert rows.filled(ids).tolist() == [SEQ_LEN] * STEP


def test_all_ranks_of_a_host_read_one_ring(opened, expected, tmp_path):
    readers = [opened(reader=reader, readers=3, ahead=1) for reader in range(3)]
    for step in range(15):
        for rows in readers:
            take(rows, step, expected)
        there = list((tmp_path / "cache" / "streams" / "run.ring.part").glob("segment-*"))
        assert len(there) <= 10, (
            "what nobody needs any more is removed, and no more is written than was asked for"
        )
    assert readers[0].padding == 0
    for rows in readers:
        rows.close()
    assert list((tmp_path / "cache" / "streams").iterdir()) == []


@pytest.mark.parametrize("workers,ahead", [(2, 1), (0, 50)])
def test_workers_and_the_size_of_the_ring_change_nothing(opened, expected, workers, ahead):
    rows = opened(workers=workers, ahead=ahead)
    for step in range(8):
        take(rows, step, expected)


def test_a_state_goes_on_at_its_row(opened, expected):
    rows = opened("first")
    states = []
    for step in range(6):
        states.append(json.loads(json.dumps(rows.state_before(step * STEP))))
        take(rows, step, expected)
    middle = rows.state_before(5 * STEP + 3)
    rows.close()
    for step in (1, 5):
        again = opened(f"again-{step}", state=states[step])
        for following in range(step, step + 3):
            take(again, following, expected)
        with pytest.raises(IndexError, match="the oldest that is kept"):
            again.rows(np.array([step * STEP - 1]))
        again.close()
    again = opened("middle", state=middle)
    assert again.rows(np.array([5 * STEP + 3])).input_ids[0].tolist() == expected[0][5 * STEP + 3][0]


def test_a_step_may_need_more_segments_than_are_made_ahead(opened, expected):
    rows = opened(ahead=1)
    ids = np.arange(200)
    assert rows.label_tokens(ids).tolist() == [expected[1][row] for row in range(200)]
    assert rows.rows(ids[::-1]).input_ids[-1].tolist() == expected[0][0][0]
    rows.label_tokens(np.arange(150, 200))
    with pytest.raises(IndexError, match="row 0 is asked for"):
        rows.rows(np.array([0]))
    assert rows.state_before(150)["row"] == 150


def test_a_state_whose_rows_differ_now(opened, expected, request_of, tmp_path):
    rows = opened("first")
    take(rows, 0, expected)
    state = next(state for state in map(rows.state_before, range(1, STEP)) if state["check"])
    rows.close()
    for path in (tmp_path / "data").iterdir():  # of the same size, so it shows nowhere else
        path.write_text(path.read_text().replace("x", "y"))
    rows = opened("second", state=state)
    with pytest.raises(DstrainError, match="differ from those that were made before the checkpoint"):
        rows.rows(np.array([state["row"]]))


def test_an_error_of_a_record_comes_behind_the_rows_before_it(opened, request_of, tmp_path):
    with (tmp_path / "data" / "3.jsonl").open("a") as file:
        file.write("\n{no\n")
    stream = Stream.open(request_of)
    made = make_rows(stream, StreamState())
    before = []
    with pytest.raises(DstrainError):
        before.extend(made)
    last = before[-1].after.first
    readers = [opened(reader=reader, readers=2) for reader in range(2)]
    for rows in readers:
        assert rows.rows(np.arange(last)).input_ids.shape == (last, SEQ_LEN)
    for rows in readers:
        with pytest.raises(DstrainError, match="not JSON") as failed:
            rows.rows(np.array([last]))
        assert failed.value.where == f"{tmp_path}/data/3.jsonl:51"
        rows.close()  # the second one is told all the same


def test_files_that_are_not_those_of_the_plan(opened):
    rows = opened(fingerprint="0" * 32)
    with pytest.raises(DstrainError, match="not those that the stream was made for"):
        rows.rows(np.array([0]))


def test_what_nobody_expected_is_an_error_with_its_place(tmp_path):
    request = tmp_path / "cache" / "streams" / "other.ring.part"
    request.mkdir(parents=True)
    (request / "request.json").write_text(
        json.dumps({"readers": 1, "ahead": 1, "workers": 0, "stream": {}, "fingerprint": "", "state": {}})
    )
    with pytest.raises(DstrainError, match="the data can't be prepared: TypeError"):
        run_module("dstrain.data.streaming.producer", str(request))
    reader = RingReader(RingFolder(request), 0)
    with pytest.raises(DstrainError, match="the data can't be prepared: TypeError") as failed:
        reader.segment(0)
    assert "stream.py:" in failed.value.where


def test_a_killed_process_is_an_error_on_all_ranks(opened, expected):
    readers = [opened(reader=reader, readers=2, ahead=1) for reader in range(2)]
    for rows in readers:
        take(rows, 0, expected)
    os.kill(readers[0]._process._process.pid, signal.SIGKILL)
    for rows in (readers[1], readers[0]):
        with pytest.raises(DstrainError, match="has been killed"):
            rows.rows(np.array([500]))
    readers[0].close()
    with pytest.raises(DstrainError, match="has been killed"):
        readers[1].rows(np.array([500]))


def test_a_killed_worker_is_an_error(opened, request_of):
    request = StreamRequest.from_json({**request_of.to_json(), "window": 100_000, "characters": 10**9})
    rows = opened(request=request, workers=1)  # an epoch is a block, which takes a moment
    while not (workers := children(rows._process._process.pid)):
        time.sleep(0.001)
    os.kill(workers[0], signal.SIGKILL)
    with pytest.raises(DstrainError, match="a worker process was ended by SIGKILL"):
        rows.rows(np.array([10**6]))


def test_the_ring_of_a_rank_that_has_closed_it(opened, expected):
    readers = [opened(reader=reader, readers=2, ahead=1) for reader in range(2)]
    for rows in readers:
        take(rows, 0, expected)
    readers[0].close()
    with pytest.raises(DstrainError, match="the rank that makes the rows"):
        readers[1].rows(np.array([500]))
    with pytest.raises(RuntimeError, match="closed"):
        readers[0].rows(np.array([500]))


def test_what_is_left_of_a_killed_run_is_removed(opened, expected, tmp_path):
    rows = opened("alive", ahead=1)
    take(rows, 0, expected)
    folder = RingFolder.below(tmp_path / "cache" / "streams", "dead")
    folder.make()
    writer = RingWriter(folder, 1)
    os.close(writer._lock)
    clear_leftovers(tmp_path / "cache")
    assert not folder.path.exists()
    take(rows, 1, expected)


def test_nothing_is_written_where_nobody_reads(opened, tmp_path, monkeypatch):
    rows = opened(ahead=2)
    rows.rows(np.array([0]))
    folder = tmp_path / "cache" / "streams" / "run.ring.part"
    until = time.monotonic() + 20
    while not (folder / "segment-2").exists():
        assert time.monotonic() < until
        time.sleep(0.01)
    time.sleep(0.3)
    assert not (folder / "segment-3").exists()


def test_a_file_system_without_locks(opened, expected, tmp_path, monkeypatch):
    def no_lock(file, how):
        raise OSError(ring_module.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(ring_module.fcntl, "flock", no_lock)
    rows = opened()
    take(rows, 0, expected)
    os.kill(rows._process._process.pid, signal.SIGKILL)
    with pytest.raises(DstrainError, match="has been killed"):
        rows.rows(np.array([500]))
