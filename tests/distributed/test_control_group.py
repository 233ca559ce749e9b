"""What ranks say to each other beside training: a rank that is slow with its disk ends no run."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from dstrain.launch.command import free_port
from tests.distributed.test_background_saving import checkpoints_in
from tests.distributed.test_injuries import micro_batches
from tests.support.distributed.training import Case, build_case_engine
from tests.support.distributed.workers import WorkerError, run
from tests.support.sampling import heavy

PATIENCE = 6.0
SLOW = 9.0
SHORT = Case(layers=2)
STAGES = replace(SHORT, zero=1, pipeline=2)
CASES = [
    (STAGES, False, True),
    (replace(SHORT, zero=3, data_parallel=2), True, True),
    *heavy(
        (replace(SHORT, zero=2, data_parallel=2), True, False),
        (replace(SHORT, zero=3, data_parallel=2), False, False),
    ),
]
"""With whether a checkpoint is written in the background, and whether it is read as one of another layout."""


@contextmanager
def slowly(rank: int, module: Any, name: str) -> Iterator[None]:
    """On rank 1 a function takes `SLOW` seconds longer, the first time."""
    if rank != 1:
        yield
        return
    ordinary = getattr(module, name)

    seconds = [SLOW]

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds.pop() if seconds else 0)
        return ordinary(*args, **kwargs)

    setattr(module, name, slow)
    try:
        yield
    finally:
        setattr(module, name, ordinary)


def save_and_go_on(rank: int, case: Case, folder: str, background: bool, other_layout: bool) -> list[float]:
    """Rank 1 writes and reads for longer than the training's groups wait."""
    engine, plan = build_case_engine(case)
    batches = {step: micro_batches(case, plan.layout.replica(rank), step) for step in (1, 2)}
    losses = [engine.train_batch(batches[1], case.lr).loss]
    with slowly(rank, torch, "save"):
        checkpoints = checkpoints_in(folder, plan, background=background)
        checkpoints.save(engine, 1)
        checkpoints.finish()
    losses.append(engine.train_batch(batches[2], case.lr).loss)
    if other_layout:  # as if it were: the same engine reads the files in dstrain's own way
        from dstrain.engine import restore

        with slowly(rank, restore, "_fill"):
            engine.load(checkpoints_in(folder, plan).newest_usable(), other_layout=True)
    else:
        with slowly(rank, torch, "load"):
            checkpoints_in(folder, plan).load_newest(engine)
    losses.append(engine.train_batch(batches[2], case.lr).loss)
    return losses


@pytest.mark.parametrize(("case", "background", "other_layout"), CASES, ids=str)
def test_a_disk_may_be_slower_than_the_training_waits(
    case: Case, background: bool, other_layout: bool, tmp_path: Path
) -> None:
    one, other = run(2, save_and_go_on, case, str(tmp_path), background, other_layout, patience=PATIENCE)
    assert one == other and one[1] == pytest.approx(one[2], rel=1e-6)


def wait_in_the_training(rank: int) -> None:
    if rank == 1:
        time.sleep(SLOW)
    distributed.all_reduce(torch.zeros(1))


def test_the_training_itself_waits_no_longer() -> None:
    with pytest.raises(WorkerError, match=r"(?i)timed out"):
        run(2, wait_in_the_training, patience=PATIENCE)


def read_weights(rank: int, case: Case) -> float:
    """Rank 1 builds its layers for longer than the training's groups wait."""
    from dstrain.model.pipeline_model import PipelineModel

    build: Callable[..., Any] = PipelineModel.build
    slow = [0] if rank == 1 else []

    def build_slowly(self: Any, index: int) -> Any:
        if slow:
            slow.pop()
            time.sleep(SLOW)
        return build(self, index)

    PipelineModel.build = build_slowly  # type: ignore[method-assign]
    engine, plan = build_case_engine(case)
    return float(engine.train_batch(micro_batches(case, plan.layout.replica(rank), 1), case.lr).loss)


@pytest.mark.parametrize("case", [STAGES, replace(SHORT, zero=2, data_parallel=2)], ids=str)
def test_a_rank_may_be_slow_to_read_its_weights(case: Case) -> None:
    one, other = run(2, read_weights, case, patience=PATIENCE)
    assert one == other


def timeouts(rank: int, port: int) -> dict[str, Any]:
    """By name of the group, in seconds."""
    from deepspeed import comm

    from dstrain.control_group import all_reduce_max, control_group
    from dstrain.engine.build import start_communication

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    distributed.destroy_process_group()
    start_communication(7)
    later = comm.new_group([0])
    assert all_reduce_max([3, -2]) == [3, -2]
    groups = {"default": distributed.group.WORLD, "later": later, "control": control_group()}
    return {
        name: group._get_backend(torch.device("cpu")).options._timeout.total_seconds()  # type: ignore[union-attr]
        for name, group in groups.items()
    }


def test_each_group_waits_as_long_as_is_set() -> None:
    [found] = run(1, timeouts, free_port())
    assert found == {"default": 7.0, "later": 7.0, "control": 86_400.0}
