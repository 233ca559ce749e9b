"""A training on a stream that is killed again and again, and goes on with another number of replicas each time."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import numpy as np

from dstrain.data.streaming.making import make_rows
from dstrain.data.streaming.state import StreamState
from dstrain.data.streaming.stream import Stream
from tests.support.streaming.replica import GLOBAL_BATCH, content_of

REPOSITORY = Path(__file__).resolve().parents[3]
PATIENCE = 60  # seconds in which all processes of a launch have ended after one was killed


class KilledTraining:
    """Launches that are killed at random moments, with what was seen of them."""

    def __init__(self, folder, request, seed):
        self.folder = folder
        self.request = request
        self.random = random.Random(seed)
        self.launches = 0
        self.victims = []
        folder.mkdir()
        asked = {"stream": request.to_json(), "fingerprint": Stream.open(request).fingerprint}
        (folder / "request.json").write_text(json.dumps(asked))
        (folder / "checkpoint.json").write_text(json.dumps({"step": 0, "state": None}))

    @property
    def saved(self):
        return json.loads((self.folder / "checkpoint.json").read_text())["step"]

    def start(self, replicas, last):
        self.launches += 1
        launch = f"launch{self.launches}"
        (self.folder / f"meeting-{launch}").write_bytes(np.zeros(replicas, np.int64).tobytes())
        command = [
            sys.executable,
            "-m",
            "tests.support.streaming.replica",
            str(self.folder),
            launch,
            str(replicas),
        ]
        return [
            subprocess.Popen(
                [*command, str(replica), str(last)],
                cwd=REPOSITORY,
                stderr=(self.folder / f"errors-{launch}-{replica}").open("wb"),
            )
            for replica in range(replicas)
        ]

    def kill_one(self, replicas):
        """Start, kill a replica or the process that makes the rows, and see that all of them end.

        The moment is any: while they start, or some steps after the last checkpoint.
        """
        processes = self.start(replicas, last=10**9)
        producer = None
        if self.random.random() < 0.25:
            time.sleep(self.random.uniform(0, 1))
        else:
            self.wait_for_step(self.saved + self.random.randint(1, 30), processes)
            time.sleep(self.random.uniform(0, 0.01))
        producer = next(iter(children(processes[0].pid)), None)
        victim = self.random.randrange(replicas)
        if producer and self.random.random() < 0.5:
            victim = "producer"
        self.victims.append(victim)
        os.kill(producer if victim == "producer" else processes[victim].pid, signal.SIGKILL)
        if victim == "producer":  # all of them notice that by themselves
            codes = [process.wait(PATIENCE) for process in processes]
            assert all(codes), codes
        for process in processes:  # as a launcher does
            if victim != "producer":
                process.kill()
            process.wait(PATIENCE)
        until = time.monotonic() + PATIENCE
        while producer and alive(producer):
            assert time.monotonic() < until, "the process that makes the rows outlives the ranks"
            time.sleep(0.005)

    def wait_for_step(self, step, processes):
        steps = np.memmap(self.folder / f"meeting-launch{self.launches}", np.int64, mode="r")
        while steps.min() < step:
            assert not [process for process in processes if process.poll() is not None]
            time.sleep(0.002)

    def finish(self, replicas, last):
        """Go on to that step without being disturbed."""
        processes = self.start(replicas, last)
        assert [process.wait(10 * PATIENCE) for process in processes] == [0] * replicas
        assert not list((self.folder / "streams").glob(f"launch{self.launches}.*")), "the ring is gone"

    def seen(self):
        """For each step the rows that were trained on in it, by the launch that was the last to do it."""
        found = {}
        for launch in range(1, self.launches + 1):
            of_launch = {}
            for path in sorted(self.folder.glob(f"log-launch{launch}-*.jsonl")):
                lines = path.read_bytes().split(b"\n")
                for line in lines[:-1]:  # the last one may be cut
                    said = json.loads(line)
                    of_launch.setdefault(said["step"], []).append(said)
            yield from ((launch, step, parts) for step, parts in of_launch.items())
            found |= of_launch
        self.last_of_step = found

    def check(self):
        """Every row that any launch saw is that of an undisturbed pass; every step was done once, and whole."""
        expected, labels = undisturbed(self.request, self.saved * GLOBAL_BATCH)
        looked_at = 0
        for _, step, parts in self.seen():
            for part in parts:
                assert part["labels"] == sum(labels[(step - 1) * GLOBAL_BATCH : step * GLOBAL_BATCH])
                for row, content in part["rows"].items():
                    assert expected[int(row)] == content, (step, row)
                    looked_at += 1
        taken = []
        for step in range(1, self.saved + 1):
            rows = list(chain.from_iterable(part["rows"] for part in self.last_of_step[step]))
            assert len(rows) == GLOBAL_BATCH
            taken += map(int, rows)
        assert sorted(taken) == list(range(self.saved * GLOBAL_BATCH)), (
            "none is left out, and none comes twice"
        )
        return looked_at


def undisturbed(request, rows):
    """The content and the labels of that many rows, and of some more, made in this process in one go."""
    contents, labels = [], []
    for made in make_rows(Stream.open(request), StreamState()):
        batch = made.rows.rows(made.order)
        contents += [content_of(batch, at) for at in range(made.order.size)]
        labels += made.rows.label_tokens(made.order).tolist()
        if len(contents) > rows + 100 * GLOBAL_BATCH:
            return contents, labels


def children(pid):
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
