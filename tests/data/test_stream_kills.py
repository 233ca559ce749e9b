"""Streams whose processes are killed at any moment, and that go on with more or fewer replicas: the same samples."""

import json

import numpy as np
import pytest

from dstrain.data.chat.options import RecordOptions
from dstrain.data.streaming.stream import StreamRequest
from tests.support.streaming.killed import KilledTraining


def write_texts(folder):
    """Shards of several kinds, with documents that all differ, and one that is divided into parts."""
    folder.mkdir()
    rng = np.random.default_rng(3)
    for shard in range(6):
        sizes = rng.integers(1, 400, 60)
        lines = [json.dumps({"text": f"{shard}.{n} " + "x" * int(size)}) for n, size in enumerate(sizes)]
        (folder / f"{shard}.jsonl").write_text("\n".join(lines))
    (folder / "long.txt").write_text("".join(f"line {number} of a long text\n" for number in range(12_000)))
    return StreamRequest(str(folder), "bytes", 64, 11, window=32, characters=6000)


def write_conversations(folder):
    folder.mkdir()
    rng = np.random.default_rng(4)
    for shard in range(5):
        turns = [
            [{"role": "user", "content": f"{shard}.{n}?"}, {"role": "assistant", "content": "a" * int(size)}]
            for n, size in enumerate(rng.integers(1, 90, 80))
        ]
        lines = [json.dumps({"messages": messages}) for messages in turns]
        (folder / f"{shard}.jsonl").write_text("\n".join(lines))
    records = RecordOptions("messages")
    return StreamRequest(str(folder), "bytes", 128, 12, records=records, window=40, characters=6000)


WRITERS = {"texts": write_texts, "conversations": write_conversations}


def kill_and_go_on(place, kind, kills):
    request = WRITERS[kind](place / "data")
    training = KilledTraining(place / "run", request, seed=f"{kind} {kills}")
    for number in range(kills):
        training.kill_one((4, 2)[number % 2])
    training.finish(4, training.saved + 20)
    looked_at = training.check()
    producers = training.victims.count("producer")
    print(f"{kills} kills, {producers} of the producer; {training.saved} steps, {looked_at} rows compared")
    return training


def test_a_few_kills(tmp_path):
    training = kill_and_go_on(tmp_path, "texts", 3)
    assert "producer" in training.victims and training.saved > 20


@pytest.mark.heavy
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", WRITERS)
def test_a_hundred_kills(tmp_path, kind):
    training = kill_and_go_on(tmp_path, kind, 100)
    assert training.victims.count("producer") >= 15
    assert training.saved > 200, "the kills have met a training, and not only its start"
