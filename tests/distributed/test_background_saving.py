"""Checkpoints that are written behind the training: the same files as without, whole or invisible, and never silent."""

from __future__ import annotations

import errno
import itertools
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch

from dstrain.runs.checkpoint.manifest import (
    damage_of,
    file_sizes,
    files_of,
    half_written,
    named_checkpoints,
    read_manifest,
    wrong_files,
)
from tests.distributed.test_injuries import RUN, micro_batches
from tests.support.distributed.training import Case, build_case_engine
from tests.support.distributed.workers import WorkerError, run
from tests.support.sampling import heavy

SHORT = Case(layers=2)
# Frozen ones lie beside the shapes with ZeRO-2 and 3; fp16 has a loss scale that changes from step to step.
FROZEN = ("model.layers.0.*",)
SAVED = [
    replace(SHORT, zero=0),
    replace(SHORT, zero=0, pipeline=2),
    replace(SHORT, zero=1, data_parallel=2, precision="bf16"),
    replace(SHORT, zero=1, pipeline=2),
    replace(SHORT, zero=1, pipeline=2, schedule="dualpipev"),
    replace(SHORT, zero=1, data_parallel=2, precision="fp16", loss_scale_power=32),
    replace(SHORT, zero=2, data_parallel=2, freeze=FROZEN),
    replace(SHORT, zero=2, pipeline=2, precision="bf16", tied=False),
    *heavy(replace(SHORT, zero=2, data_parallel=2, precision="bf16", offload="cpu")),
    replace(SHORT, zero=3, data_parallel=2, precision="bf16", freeze=FROZEN),
    replace(SHORT, zero=3, pipeline=2, data_parallel=2),
]


def checkpoints_in(folder: Path | str, plan: Any = None, **options: Any) -> Any:
    from dstrain.train.checkpointing.checkpoints import Checkpoints

    options = {"keep": 3, "background": True, **options}
    return Checkpoints(Path(folder), identity=plan.identity if plan else {}, run=RUN, config={}, **options)


@contextmanager
def in_the_background(before_writing: Callable[[str], None]) -> Iterator[None]:
    """Calls the function with the path before any thread but the training's writes a file of tensors."""
    ordinary = torch.save

    def save(state: Any, path: str, **options: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            before_writing(path)
        ordinary(state, path, **options)

    torch.save = save  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.save = ordinary


def train_on_while_it_is_written(rank: int, case: Case, folder: str) -> dict[str, Any]:
    """Save step 2 at once and in the background, and write the latter only when step 4 is trained."""
    engine, plan = build_case_engine(case)
    batches = {step: micro_batches(case, plan.layout.replica(rank), step) for step in range(1, 5)}
    for step in (1, 2):
        engine.train_batch(batches[step], case.lr)
    checkpoints_in(Path(folder) / "at once", plan, background=False).save(engine, 2)
    trained = threading.Event()
    waited = []

    def wait(path: str) -> None:
        waited.append(trained.wait(timeout=60))

    behind = Path(folder) / "behind"
    with in_the_background(wait):
        checkpoints = checkpoints_in(behind, plan)
        checkpoints.save(engine, 2)
        losses = [engine.train_batch(batches[step], case.lr).loss for step in (3, 4)]
        checkpoints.raise_if_failed()
        named = len(named_checkpoints(behind))
        trained.set()
        checkpoints.finish()
    return {"losses": losses, "named": named, "waited": waited}


def go_on(rank: int, case: Case, folder: str) -> list[float]:
    engine, plan = build_case_engine(case)
    first = checkpoints_in(folder, plan).load_newest(engine) + 1
    assert first == 3
    replica = plan.layout.replica(rank)
    return [engine.train_batch(micro_batches(case, replica, step), case.lr).loss for step in (3, 4)]


@pytest.mark.parametrize("case", SAVED, ids=str)
def test_the_same_files_as_those_that_are_written_at_once(case: Case, tmp_path: Path) -> None:
    told = run(case.world_size, train_on_while_it_is_written, case, str(tmp_path))
    assert any(rank["waited"] for rank in told)
    assert all(all(rank["waited"]) and not rank["named"] for rank in told), "the training went on meanwhile"
    at_once, behind = (tmp_path / name / "step-000002" for name in ("at once", "behind"))
    assert file_sizes(behind).keys() == file_sizes(at_once).keys()
    for name, size in file_sizes(at_once).items():
        if name.endswith(".pt"):
            tensors = assert_alike(load(behind / name), load(at_once / name), name)
            # A tensor that was a view of a larger buffer has a record of its own in torch's file.
            assert file_sizes(behind)[name] <= size + 300 * tensors
        else:
            assert (behind / name).read_bytes() == (at_once / name).read_bytes()
    files = files_of(read_manifest(behind))
    assert files.keys() == file_sizes(behind).keys() and not wrong_files(behind, files, files)
    assert [path.name for path in behind.parent.iterdir()] == ["step-000002"]
    assert not (behind / "words").exists()
    assert run(case.world_size, go_on, case, str(behind.parent)) == [rank["losses"] for rank in told]


def load(path: Path) -> Any:
    return torch.load(path, weights_only=False)


def assert_alike(one: Any, other: Any, where: str) -> int:
    """Returns the number of tensors."""
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        told = [(t.dtype, t.shape, t.requires_grad, t.device) for t in (one, other)]
        assert told[0] == told[1] and torch.equal(one, other), where
        return 1
    if isinstance(one, dict):
        assert list(one) == list(other), where
        return sum(assert_alike(one[key], other[key], f"{where}[{key!r}]") for key in one)
    if isinstance(one, list | tuple):
        assert len(one) == len(other), where
        pairs = enumerate(zip(one, other, strict=True))
        return sum(assert_alike(here, there, f"{where}[{index}]") for index, (here, there) in pairs)
    if type(one).__module__.startswith("deepspeed.") and not isinstance(one, Enum):
        return assert_alike(vars(one), vars(other), f"{where}: {type(one).__name__}")
    assert one == other, where
    return 0


def test_what_is_one_tensor_stays_one_and_a_view_takes_what_it_shows(tmp_path: Path) -> None:
    from dstrain.engine.async_checkpoint import host_copy

    buffer = torch.arange(1_000_000.0)
    weight = torch.nn.Parameter(buffer[10:20].view(2, 5))
    state = {"a": weight, "b": [weight, buffer[10:20].view(2, 5)], "c": buffer[15:25], "n": (1, "x", None)}
    copied = host_copy(state)
    buffer.zero_()
    torch.save(copied, tmp_path / "file")
    assert (tmp_path / "file").stat().st_size < 10_000
    read = load(tmp_path / "file")
    assert isinstance(read["a"], torch.nn.Parameter) and read["n"] == (1, "x", None)
    assert read["a"].flatten().tolist() == list(range(10, 20)) and read["c"].tolist() == list(range(15, 25))
    assert {read["a"].data_ptr(), read["b"][0].data_ptr(), read["b"][1].data_ptr()} == {read["a"].data_ptr()}
    assert read["b"][0] is read["a"]


class TorchWriter:
    """In place of DeepSpeed's checkpoint engine."""

    def save(self, state: Any, path: str) -> None:
        torch.save(state, path)


class LargeEngine:
    """Saves a file of 2 MB a rank through its checkpoint engine, as DeepSpeed does, and a small one by itself."""

    checkpoint_engine: Any = TorchWriter()

    def save(self, folder: Path, state: dict[str, Any], held: Any = None) -> None:
        rank = int(os.environ["RANK"])
        (folder / "state").mkdir(exist_ok=True)
        (folder / "state" / f"small-{rank}").write_bytes(bytes([rank]))
        content = {"step": state["step"], "weights": torch.full((500_000,), float(state["step"]))}
        with held.in_place_of_writer(self):
            self.checkpoint_engine.save(content, str(folder / "state" / f"rank-{rank}.pt"))


def save_steps(
    rank: int, folder: str, steps: list[int], seconds: float, options: dict[str, Any]
) -> list[str]:
    """Save one step after the other; each file takes so many seconds. What was there and said in the end."""
    said: list[str] = []
    checkpoints = checkpoints_in(folder, say=said.append, **options)
    with in_the_background(lambda path: time.sleep(seconds)), checkpoints:
        for step in steps:
            checkpoints.save(LargeEngine(), step)
    return said


def steps_in(folder: Path) -> list[int]:
    assert all(damage_of(path) is None for path in named_checkpoints(folder))
    return [int(path.name.removeprefix("step-")) for path in named_checkpoints(folder)]


def test_a_save_waits_for_the_one_before(tmp_path: Path) -> None:
    assert run(2, save_steps, str(tmp_path), [1, 2, 3, 4], 0.3, {"keep": 2, "keep_every": 2}) == [[], []]
    assert steps_in(tmp_path) == [2, 3, 4]
    for step in (2, 3, 4):
        assert len(file_sizes(tmp_path / f"step-{step:06d}")) == 4
        for rank in range(2):
            read = load(tmp_path / f"step-{step:06d}" / "state" / f"rank-{rank}.pt")
            assert read["step"] == step and (read["weights"] == step).all()


def save_with_room(rank: int, folder: str, room: int) -> tuple[list[str], list[str]]:
    """What was written behind the training, and what was said."""
    import dstrain.train.checkpointing.checkpoints as module

    module.room_for_copy = lambda: room
    said: list[str] = []
    behind: list[str] = []
    checkpoints = checkpoints_in(folder, say=said.append)
    with in_the_background(behind.append), checkpoints:
        for step in (1, 2):
            checkpoints.save(LargeEngine(), step)
    return behind, said


@pytest.mark.parametrize("room", [0, 1_999_999, 2_000_000])
def test_what_finds_no_room_is_written_in_the_step(room: int, tmp_path: Path) -> None:
    (behind, said), (of_the_other, silent) = run(2, save_with_room, str(tmp_path), room)
    assert steps_in(tmp_path) == [1, 2] and not silent
    if room == 2_000_000:
        assert (len(behind), len(of_the_other), said) == (2, 2, [])
    else:
        line = "host memory has no room for a copy of 0.0 GB: checkpoints are written while training waits"
        assert (behind, of_the_other, said) == ([], [], [line])


def no_space(path: str) -> None:
    Path(path).write_bytes(bytes(1_000_000))
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def file_limit(path: str) -> None:
    """What the system then refuses is torch's own writing, from within."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def mistake(path: str) -> None:
    raise ZeroDivisionError("a mistake of ours")


WAYS: dict[str, tuple[Callable[[str], None], str]] = {
    "no space": (no_space, "the checkpoint of step 2 could not be written: No space left on device"),
    "file limit": (file_limit, "the checkpoint of step 2 could not be written: File too large"),
    "mistake": (mistake, "ZeroDivisionError: a mistake of ours"),
}


def save_and_fail(rank: int, folder: str, way: str, failing: int, told: str) -> str:
    """Save step 1, fail to save step 2 on one rank, and go on: the error, and what is on the disk then."""
    checkpoints = checkpoints_in(folder)
    checkpoints.save(LargeEngine(), 1)
    checkpoints.finish()
    hurt = WAYS[way][0] if rank == failing else lambda path: None
    with in_the_background(hurt):
        checkpoints.save(LargeEngine(), 2)
        try:
            if told == "at the next save":
                checkpoints.save(LargeEngine(), 3)
            elif told == "at the end":
                with checkpoints:
                    pass
            else:
                with checkpoints:
                    for _ in range(1000 if rank in (0, failing) else 0):
                        checkpoints.raise_if_failed()
                        time.sleep(0.02)
                    raise ConnectionError("a rank is gone")
        except Exception as error:
            gone = rank != 0 or not half_written(Path(folder))
            return f"{type(error).__name__}: {error}" if gone else "half of it is left"
    return ""


@pytest.mark.parametrize(
    ("way", "failing", "told"),
    [
        *itertools.product(["no space"], [0, 1], ["at the next step", "at the next save", "at the end"]),
        ("file limit", 1, "at the next step"),
        ("mistake", 1, "at the next step"),
        ("mistake", 0, "at the end"),
    ],
)
def test_a_write_that_fails_is_an_error(way: str, failing: int, told: str, tmp_path: Path) -> None:
    said = run(2, save_and_fail, str(tmp_path), way, failing, told)
    assert WAYS[way][1] in said[failing]
    other = said[1 - failing]
    if told == "at the next step" and failing == 0:
        assert other == "ConnectionError: a rank is gone", "others find out by the next collective"
    else:
        assert other.startswith("DstrainError: ") and WAYS[way][1].rpartition(": ")[2] in other, other
    for line in said:
        if line.startswith("DstrainError"):
            assert "hint: step-000001 is complete and can be resumed from" in line
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"], "half of it is gone"
    assert steps_in(tmp_path) == [1]


def save_and_be_killed(rank: int, folder: str, killed: int) -> None:
    def kill(path: str) -> None:
        if rank == killed:
            Path(path).write_bytes(bytes(1_000_000))
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoints = checkpoints_in(folder)
    checkpoints.save(LargeEngine(), 1)
    checkpoints.finish()
    with in_the_background(kill):
        checkpoints.save(LargeEngine(), 2)
        time.sleep(60)


@pytest.mark.parametrize("killed", [0, 1])
def test_killed_while_writing_the_one_before_is_usable(killed: int, tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match=f"rank {killed} died"):
        run(2, save_and_be_killed, str(tmp_path), killed)
    assert len(half_written(tmp_path)) == 1 and steps_in(tmp_path) == [1]
    run(2, save_steps, str(tmp_path), [3], 0.0, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000003"]


def save_and_lose_a_rank(rank: int, folder: str) -> str:
    checkpoints = checkpoints_in(folder)
    with in_the_background(lambda path: time.sleep(0.5)):
        checkpoints.save(LargeEngine(), 1)
        if rank == 1:
            os._exit(1)
        try:
            checkpoints.finish()
        except RuntimeError as error:
            return str(error)
    return ""


def test_no_rank_waits_for_one_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match="rank 1 died"):
        run(2, save_and_lose_a_rank, str(tmp_path))


def train_into_an_error(rank: int, folder: str, alone: bool) -> float:
    """An error while step 1 is written; ``alone``: the other rank has ended without a word."""
    from dstrain.train.checkpointing import background_writer

    background_writer.PATIENCE = 1.0
    checkpoints = checkpoints_in(folder)

    def slow(path: str) -> None:
        if alone and rank == 1:
            threading.Event().wait()
        time.sleep(0.5)

    began = time.monotonic()
    with in_the_background(slow):
        checkpoints.save(LargeEngine(), 1)
        if alone and rank == 1:
            return 0.0
        with pytest.raises(ValueError, match="nan"), checkpoints:
            raise ValueError("nan")
    return time.monotonic() - began


def test_an_error_of_the_training_leaves_the_last_checkpoint_time_to_be_written(tmp_path: Path) -> None:
    run(2, train_into_an_error, str(tmp_path), False)
    assert steps_in(tmp_path) == [1]


def test_but_not_without_end_where_a_rank_is_gone(tmp_path: Path) -> None:
    seconds = run(2, train_into_an_error, str(tmp_path), True)[0]
    assert 1.5 < seconds < 60 and steps_in(tmp_path) == []
