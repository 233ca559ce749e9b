"""Saving among ranks: when, how many stay, what it takes of the disk, and being killed at any instant of it."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dstrain.runs.checkpoint.manifest import complete_checkpoints, damage_of, named_checkpoints
from tests.distributed.test_injuries import micro_batches
from tests.support.distributed import training
from tests.support.distributed.training import Case, model_config
from tests.support.distributed.workers import WorkerError, run
from tests.support.sampling import heavy

RUN = "0123456789abcdef"


class SmallEngine:
    """Saves two files a rank."""

    def save(self, folder: Path, state: Mapping[str, Any], held: Any = None) -> None:
        (folder / "state").mkdir(exist_ok=True)
        for part in ("model", "optimizer"):
            name = f"{part}-{os.environ['RANK']}.pt"
            (folder / "state" / name).write_bytes(bytes([state["step"]]) * 1000)


def checkpoints_in(folder: str, **options: Any) -> Any:
    from dstrain.train.checkpointing.checkpoints import Checkpoints

    options = {"keep": 2, **options}
    return Checkpoints(Path(folder), identity={}, run=RUN, config={}, **options)


def save_steps(rank: int, folder: str, steps: list[int], options: dict[str, Any]) -> None:
    checkpoints = checkpoints_in(folder, **options)
    for step in steps:
        checkpoints.save(SmallEngine(), step)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"keep": 2}, [9, 10]),
        ({"keep": 1, "keep_every": 4}, [4, 8, 10]),
        ({"keep": 3, "keep_every": 4}, [4, 8, 9, 10]),
        ({"keep": 20}, list(range(1, 11))),
    ],
)
def test_retention(options: dict[str, Any], kept: list[int], tmp_path: Path) -> None:
    run(2, save_steps, str(tmp_path), list(range(1, 11)), options)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{step:06d}" for step in kept]
    assert len(complete_checkpoints(tmp_path)) == len(kept)


def test_a_damaged_one_does_not_count_among_those_that_are_kept(tmp_path: Path) -> None:
    run(2, save_steps, str(tmp_path), [1, 2, 3], {"keep": 3})
    (tmp_path / "step-000003" / "state" / "model-1.pt").unlink()
    run(2, save_steps, str(tmp_path), [4], {"keep": 3})
    assert [path.name for path in complete_checkpoints(tmp_path)] == [
        "step-000001",
        "step-000002",
        "step-000004",
    ]
    assert (tmp_path / "step-000003").is_dir(), "what may be mended is not thrown away"


def due_steps(rank: int) -> list[int]:
    """With a clock that runs 10 times as fast on rank 1."""
    from dstrain.config.schema import RunConfig
    from dstrain.train.checkpointing.checkpoints import SaveSchedule

    now = itertools.count(0, 10 if rank else 1)
    config = RunConfig(steps=20, save_every="5s", keep_every=7)
    schedule = SaveSchedule(config, clock=lambda: float(next(now)))
    found = []
    for step in range(1, 21):
        if schedule.due(step):
            found.append(step)
            schedule.saved()
    return found


def test_the_clock_of_rank_0_decides_for_all() -> None:
    one, other = run(2, due_steps)
    assert one == other
    # The clock is read once a step and once at a save; multiples of 7 and the last step are saved as well.
    assert one == [5, 7, 12, 14, 19, 20]


def save_until_killed(rank: int, folder: str, instant: int) -> int:
    """Save step 3, and be killed before the instant-th operation on a file; its number of operations if not."""
    changing = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")
    count = 0
    checkpoints = checkpoints_in(folder)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        # shutil.rmtree removes by names below a folder's descriptor, which do not hold the folder's own.
        if event in changing and (folder in str(arguments[0]) or event in ("os.remove", "os.rmdir")):
            if count == instant:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

    sys.addaudithook(watch)
    checkpoints.save(SmallEngine(), 3)
    return count


def choose_all(rank: int, folders: list[str]) -> list[str | None]:
    chosen = [checkpoints_in(folder).newest_usable() for folder in folders]
    return [path.name if path else None for path in chosen]


def test_killed_at_any_instant_of_a_save_a_whole_checkpoint_is_the_newest(tmp_path: Path) -> None:
    before = tmp_path / "before"
    run(1, save_steps, str(before), [1, 2], {})
    folders = []
    for instant in range(200):
        folder = tmp_path / str(instant)
        shutil.copytree(before, folder)
        folders.append(str(folder))
        try:
            run(1, save_until_killed, str(folder), instant)
            break
        except WorkerError as error:
            assert "died" in str(error)
        assert all(damage_of(path) is None for path in named_checkpoints(folder)), instant
    assert 15 < len(folders) < 200
    chosen = run(1, choose_all, folders)[0]
    named = chosen.index("step-000003")
    assert 0 < named < len(folders) - 1, "there are instants before the new name, and after it"
    assert chosen == ["step-000002"] * named + ["step-000003"] * (len(folders) - named)
    # The next run clears away what was left.
    run(1, save_steps, folders[named - 1], [3], {})
    left = sorted(path.name for path in Path(folders[named - 1]).iterdir())
    assert left == ["step-000002", "step-000003"]


def larger(case: Case) -> Any:
    """A Llama of half a million parameters: in a smaller one the files' own frame is most of them."""
    return model_config(case, vocab_size=768, hidden_size=128, intermediate_size=256)


def train_and_save(rank: int, case: Case, folder: str) -> tuple[int, int]:
    """One step and one checkpoint: the plan's estimate of its bytes, and the trained parameters."""
    training.model_config = larger
    engine, plan = training.build_case_engine(case)
    engine.train_batch(micro_batches(case, plan.layout.replica(rank), 1), case.lr)
    checkpoints_in(folder).save(engine, 1)
    return plan.checkpoint_bytes, plan.model.parameters


SHORT = Case(steps=1, layers=3)
FROZEN = ("model.layers.0.*", "model.layers.1.mlp.*")
SIZED = [
    replace(SHORT, zero=0, data_parallel=2),
    replace(SHORT, zero=0, pipeline=2, optimizer="sgd"),
    replace(SHORT, zero=1, data_parallel=2, precision="bf16"),
    replace(SHORT, zero=1, pipeline=2, data_parallel=2, precision="fp16", tied=False),
    replace(SHORT, zero=1, pipeline=2, schedule="dualpipev"),
    replace(SHORT, zero=2, data_parallel=2, optimizer="sgd"),
    replace(SHORT, zero=2, pipeline=2, freeze=FROZEN),
    replace(SHORT, zero=3, data_parallel=2, precision="bf16"),
    replace(SHORT, zero=3, data_parallel=2, freeze=FROZEN),
    replace(SHORT, zero=3, pipeline=2, data_parallel=2, precision="bf16"),
    replace(SHORT, zero=1, pipeline=2, data_parallel=2, adapter="head"),
    replace(SHORT, zero=3, data_parallel=2, precision="bf16", adapter="dora"),
    replace(SHORT, zero=0, data_parallel=2, adapter="lora"),
    *heavy(
        replace(SHORT, zero=2, data_parallel=2, precision="bf16", offload="cpu"),
        replace(SHORT, zero=1, adapter="lora"),
        replace(SHORT, zero=2, pipeline=2, precision="bf16", adapter="dora"),
        replace(SHORT, zero=3, pipeline=2, adapter="lora"),
    ),
]


@pytest.mark.parametrize("case", SIZED, ids=str)
def test_the_plan_knows_what_a_checkpoint_takes(case: Case, tmp_path: Path) -> None:
    estimate, parameters = run(case.world_size, train_and_save, case, str(tmp_path))[0]
    real = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    part = case.freeze or case.adapter or case.optimizer == "sgd"
    assert part or real > 4 * parameters, "a whole state was written"
    assert abs(estimate - real) < 0.03 * real, (estimate, real)
