"""One replica: ``python -m tests.support.streaming.replica RUN LAUNCH REPLICAS REPLICA LAST``.

It takes the samples of step after step, as a rank that trains does, writes down what they were, and meets the others at
each step's end. The first one writes a checkpoint every few steps.
"""

import hashlib
import json
import os
import sys
import time
from pathlib import Path

import numpy as np

from dstrain.data.streaming.rows import StreamRows
from dstrain.data.streaming.stream import StreamRequest

GLOBAL_BATCH = 8
SAVE_EVERY = 5


def content_of(batch, at):
    return hashlib.blake2b(b"".join(part[at].tobytes() for part in batch), digest_size=12).hexdigest()


def main(run, launch, replicas, replica, last):
    run, replicas, replica, last = Path(run), int(replicas), int(replica), int(last)
    asked = json.loads((run / "request.json").read_text())
    checkpoint = json.loads((run / "checkpoint.json").read_text())
    meeting = run / f"meeting-{launch}"
    steps = np.memmap(meeting, np.int64, mode="r+")
    log = open(run / f"log-{launch}-{replica}.jsonl", "a", buffering=1)  # noqa: SIM115 - until this process is killed
    ready = run / f"ready-{launch}"
    while replica and not ready.exists():
        time.sleep(0.001)
    stream = StreamRows(StreamRequest.from_json(asked["stream"]), asked["fingerprint"])
    with stream.open(
        run / "streams",
        launch,
        reader=replica,
        readers=replicas,
        state=checkpoint["state"],
        ahead=2,
    ) as rows:
        ready.touch()
        for step in range(checkpoint["step"] + 1, last + 1):
            ids = np.arange((step - 1) * GLOBAL_BATCH, step * GLOBAL_BATCH)
            counts = rows.label_tokens(ids)
            own = ids.reshape(-1, replicas)[:, replica]
            batch = rows.rows(own)
            labels = (batch.labels >= 0).sum(axis=1)
            assert (labels == counts.reshape(-1, replicas)[:, replica]).all()
            said = {str(row): content_of(batch, at) for at, row in enumerate(own)}
            log.write(json.dumps({"step": step, "rows": said, "labels": int(counts.sum())}) + "\n")
            steps[replica] = step
            while steps.min() < step:
                if os.getppid() == 1:
                    sys.exit(3)
                time.sleep(0.0005)
            if replica == 0 and step % SAVE_EVERY == 0:
                state = rows.state_before(step * GLOBAL_BATCH)
                aside = run / "checkpoint.new"
                aside.write_text(json.dumps({"step": step, "state": state}))
                aside.replace(run / "checkpoint.json")


if __name__ == "__main__":
    main(*sys.argv[1:])
