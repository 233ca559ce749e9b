"""The final weights: one replica writes them tensor by tensor, and what it writes is a safetensors file."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dstrain.train.weights_file import write_weights
from tests.support.distributed.training import Case, build_case_engine
from tests.support.distributed.workers import run

SHORT = Case(layers=2)
CASES = [
    replace(SHORT, zero=0),
    replace(SHORT, zero=3, data_parallel=2, precision="bf16"),
    replace(SHORT, zero=1, pipeline=2, data_parallel=2),
    replace(SHORT, zero=3, pipeline=2, data_parallel=2),
]


def save(rank: int, case: Case, folder: str) -> tuple[int, dict[str, Any], int, int]:
    """The stage, its weights, and the most bytes and calls of the host's that copies of them took at once."""
    from dstrain.engine import rank_engines
    from dstrain.train.final_output import save_weights

    engine, plan = build_case_engine(case)
    stage, replica = plan.layout.stage(rank), plan.layout.replica(rank)
    wanted = dict(engine.weights())
    alive: list[int] = []
    copies: list[torch.Tensor] = []
    give = rank_engines._RankEngine.weights

    def watched(self: Any) -> Iterator[tuple[str, torch.Tensor]]:
        import weakref

        seen: list[Any] = []
        for name, tensor in give(self):
            gc.collect()
            seen.append(weakref.ref(tensor))
            alive.append(sum(one() is not None for one in seen))
            copies.append(tensor.new_empty(0))
            yield name, tensor
            del tensor

    rank_engines._RankEngine.weights = watched  # type: ignore[method-assign]
    save_weights(engine, Path(folder) / "weights", stage, replica)
    return stage, wanted, max(alive, default=0), len(copies)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_first_replica_writes_one_tensor_at_a_time(case: Case, tmp_path: Path) -> None:
    told = run(case.world_size, save, case, str(tmp_path))
    files = sorted(path.name for path in (tmp_path / "weights").iterdir())
    assert files == [f"stage-{stage}.safetensors" for stage in range(case.pipeline)]
    writers = 0
    for stage, wanted, alive, copies in told:
        written = load_file(tmp_path / "weights" / f"stage-{stage}.safetensors")
        assert written.keys() == wanted.keys()
        assert all(torch.equal(written[name], wanted[name]) for name in wanted)
        assert (alive, copies) in ((1, len(wanted)), (0, 0))
        writers += copies > 0
    assert writers == case.pipeline


TENSORS = {
    "b.weight": torch.arange(6.0).view(2, 3),
    "a.scale": torch.tensor(2.5),
    "é": torch.zeros(0, 4),
    "long" * 20: torch.randn(17),
}


def test_any_order_gives_the_same_file_and_nothing_else_is_left(tmp_path: Path) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}
    for number, items in enumerate((list(TENSORS.items()), list(reversed(TENSORS.items())))):
        write_weights(tmp_path / f"{number}", shapes, items)
        read = load_file(tmp_path / f"{number}")
        assert read.keys() == TENSORS.keys()
        assert all(torch.equal(read[name], tensor) for name, tensor in TENSORS.items())
    assert (tmp_path / "0").read_bytes() == (tmp_path / "1").read_bytes()
    for wrong in (
        list(TENSORS.items())[1:],
        [("b.weight", torch.zeros(3, 2))],
        [("a.scale", torch.tensor(1))],
    ):
        with pytest.raises(ValueError, match=r"missing|is torch"):
            write_weights(tmp_path / "2", shapes, wrong)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]
