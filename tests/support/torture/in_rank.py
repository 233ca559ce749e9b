"""What a rank under torture does besides training: it writes down what it trains on, and may be hindered.

Told by environment variables that only the tests know: `RECORDS` names the folder of the records, `HINDERED`
says how this rank is hindered.
"""

from __future__ import annotations

import json
import os
import random
import resource
import sys
import time
from pathlib import Path
from typing import Any

RECORDS = "TORTURE_RECORDS"
HINDERED = "TORTURE_HINDERED"
ATTEMPT = "TORTURE_ATTEMPT"

_CHANGES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")


def prepare() -> None:
    """Before the rank's own code: all that is changed about it."""
    rank = int(os.environ["RANK"])
    _record_steps(Path(os.environ[RECORDS]) / f"rank-{rank}.jsonl", int(os.environ[ATTEMPT]))
    hindered = json.loads(os.environ.get(HINDERED, "{}"))
    if hindered.get("slow"):
        _slow_saves(random.Random(f"{hindered['seed']} {rank}"), hindered["slow"])
    if hindered.get("largest_file") and rank == hindered["rank"]:
        # What is larger is refused with EFBIG, as a full disk refuses with ENOSPC; python ignores the signal.
        resource.setrlimit(resource.RLIMIT_FSIZE, (hindered["largest_file"], resource.RLIM_INFINITY))


def _record_steps(path: Path, attempt: int) -> None:
    """A line for each step that was computed: the samples, found again from the tokens that the engine got, and the
    loss to the bit."""
    from dstrain.train import rank_engine, trainer

    batches: list[Any] = []
    step_of: dict[int, int] = {}  # by the number of the list that the engine gets: they are built ahead

    class NotedBatches(trainer.TrainBatches):  # type: ignore[name-defined,misc]
        def micro_batches(self, step: int) -> Any:
            batches[:] = [self]
            found = super().micro_batches(step)
            step_of[id(found)] = step
            return found

    build = rank_engine.build_engine
    records = path.open("a", encoding="utf-8")
    numbers: dict[bytes, int] = {}

    def build_noting(*arguments: Any, **options: Any) -> Any:
        engine = build(*arguments, **options)
        train_batch = engine.train_batch

        def noting(micro_batches: Any, lr: float) -> Any:
            if not numbers:
                numbers.update(_row_numbers(batches[0].rows))
            ids = [numbers[row.numpy().tobytes()] for batch in micro_batches for row in batch.input_ids]
            result = train_batch(micro_batches, lr)
            record = {"attempt": attempt, "step": step_of.pop(id(micro_batches)), "ids": ids, "lr": lr}
            record |= {"loss": result.loss.hex(), "norm": result.grad_norm.hex()}
            records.write(json.dumps(record) + "\n")
            records.flush()
            return result

        engine.train_batch = noting
        return engine

    trainer.TrainBatches = NotedBatches  # type: ignore[attr-defined]
    rank_engine.build_engine = build_noting  # type: ignore[attr-defined]


def _row_numbers(rows: Any) -> dict[bytes, int]:
    """Which sample has which tokens."""
    import numpy as np

    tokens = np.ascontiguousarray(rows.rows(np.arange(len(rows))).input_ids)
    found = {row.tobytes(): number for number, row in enumerate(tokens)}
    assert len(found) == len(rows), "two samples are equal: they could not be told apart"
    return found


def _slow_saves(draws: random.Random, longest: float) -> None:
    """Up to ``longest`` seconds before each operation on the files of checkpoints, so that a kill at a random moment
    finds a save between any two of them."""
    fsync = os.fsync

    def slow_fsync(descriptor: Any) -> None:
        time.sleep(draws.uniform(0, longest))
        fsync(descriptor)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _CHANGES and "/checkpoints/" in str(arguments[0]):
            time.sleep(draws.uniform(0, longest))

    os.fsync = slow_fsync
    sys.addaudithook(watch)
