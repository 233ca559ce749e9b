"""Memory that checkpoints of a GPU are copied to: used again, and never while a file is still to be written from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dstrain.engine.async_checkpoint import AsyncCheckpointStage, Staging, host_copy, pinned_memory


class Writer:
    """In place of DeepSpeed's checkpoint engine; may fail."""

    checkpoint_engine: Any = None

    def __init__(self) -> None:
        self.broken = False

    def save(self, state: Any, path: str) -> None:
        if self.broken:
            raise OSError("a full disk")
        torch.save(state, path)


class Memory:
    """In place of pinned memory, for tensors of a CPU."""

    def __init__(self, largest: int = 1 << 30) -> None:
        self.made: list[int] = []
        self.waits = 0
        self.largest = largest
        self.staging = Staging("cpu", self.allocate, self.wait)

    def allocate(self, size: int) -> torch.Tensor:
        if sum(self.made) + size > self.largest:
            raise RuntimeError("no more memory can be pinned")
        self.made.append(size)
        return torch.empty(size, dtype=torch.uint8)

    def wait(self) -> None:
        self.waits += 1


def state(value: float) -> dict[str, Any]:
    weight = torch.nn.Parameter(torch.full((3, 5), value))
    half = torch.full((7,), value, dtype=torch.bfloat16)
    return {
        "weight": weight,
        "tied": weight,
        "half": half,
        "part": half[2:4],
        "none": torch.empty(0),
        "step": 3,
    }


def held(memory: Memory, folder: Path, values: list[float], writer: Writer) -> AsyncCheckpointStage:
    engine = Writer()
    engine.checkpoint_engine = writer
    stage = AsyncCheckpointStage(1 << 20, memory.staging)
    with stage.in_place_of_writer(engine):  # type: ignore[arg-type]
        for number, value in enumerate(values):
            stage.save(state(value), str(folder / f"{number}"))
    return stage


def test_the_copy_is_that_without_staging() -> None:
    memory, taken = Memory(), list[torch.Tensor]()
    made, plain = host_copy(state(2.0), memory.staging, taken), host_copy(state(2.0))
    assert sorted(memory.made) == [4, 14, 60] == sorted(one.numel() for one in taken) and memory.waits == 1
    assert made.keys() == plain.keys() and made["tied"] is made["weight"]
    for name in ("weight", "half", "part", "none"):
        assert type(made[name]) is type(plain[name]) and made[name].dtype == plain[name].dtype
        assert torch.equal(made[name], plain[name])


def test_memory_is_used_again_when_the_files_are_written(tmp_path: Path) -> None:
    memory, writer = Memory(), Writer()
    stage = held(memory, tmp_path, [1.0, 2.0], writer)
    assert len(memory.made) == 6, "both files wait"
    assert [path.name for path in stage.write()] == ["0", "1"]
    for value in (3.0, 4.0):
        for _ in held(memory, tmp_path, [value, value + 10], writer).write():
            pass
        read = [torch.load(tmp_path / name, weights_only=False) for name in ("0", "1")]
        assert [float(one["weight"].sum()) for one in read] == [15 * value, 15 * (value + 10)]
        assert [float(one["part"].sum()) for one in read] == [2 * value, 2 * (value + 10)]
    assert len(memory.made) == 6 and memory.staging.bytes == sum(memory.made) == 2 * (60 + 14 + 4)
    assert (tmp_path / "0").stat().st_size < 4000


def test_what_was_not_written_gives_its_memory_back(tmp_path: Path) -> None:
    memory, writer = Memory(), Writer()
    writer.broken = True
    stage = held(memory, tmp_path, [1.0, 2.0], writer)
    with pytest.raises(OSError, match="a full disk"):
        next(stage.write())
    stage.drop()
    assert not stage.paths
    held(memory, tmp_path, [5.0, 6.0], writer)
    assert len(memory.made) == 6


def test_what_is_not_used_any_more_is_freed(tmp_path: Path) -> None:
    memory, writer = Memory(), Writer()
    for _ in held(memory, tmp_path, [1.0, 2.0], writer).write():
        pass
    waiting = held(memory, tmp_path, [3.0], writer)
    memory.staging.free_unused()
    assert memory.staging.bytes == 78
    for _ in waiting.write():
        pass
    assert float(torch.load(tmp_path / "0", weights_only=False)["weight"].sum()) == 45
    memory.staging.free_unused()
    assert memory.staging.bytes == 0


def test_where_no_more_is_pinned_ordinary_memory_is_taken(tmp_path: Path) -> None:
    memory, writer = Memory(largest=70), Writer()
    for _ in held(memory, tmp_path, [1.0, 2.0], writer).write():
        pass
    assert memory.staging.bytes == sum(memory.made) <= 70
    assert float(torch.load(tmp_path / "1", weights_only=False)["weight"].sum()) == 30


def test_just_so_many_bytes_are_pinned_and_unpinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no GPU here: what is asked of CUDA is noted."""
    asked: list[tuple[Any, ...]] = []

    class Runtime:
        def cudaHostRegister(self, *arguments: int) -> int:  # noqa: N802 - CUDA's name
            asked.append(("pin", *arguments))
            return 0 if arguments[1] < 1000 else 2

        def cudaHostUnregister(self, place: int) -> None:  # noqa: N802
            asked.append(("unpin", place))

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    memory = pinned_memory(65)
    place = memory.data_ptr()
    assert memory.shape == (65,) and asked == [("pin", place, 65, 0)]
    staging = Staging("cpu", pinned_memory, lambda: None)
    staging.give_back([memory])
    del memory
    assert len(asked) == 1, "it is kept"
    staging.free_unused()
    assert asked[1:] == [("unpin", place)]
    assert staging.take(1000) is None


def test_tensors_of_a_cpu_are_copied_as_they_were() -> None:
    taken: list[torch.Tensor] = []
    made = host_copy(state(2.0), Staging(), taken)
    assert not taken and torch.equal(made["weight"], state(2.0)["weight"])
