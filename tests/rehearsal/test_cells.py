"""Ranks of true size: the plan's memory within 5 % of the rehearsed, its bytes equal, waits within a budget."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from dstrain.report.rehearsal import waits_in_a_step
from tests.rehearsal.conftest import Rehearse


@dataclass(frozen=True)
class Cell:
    """One plan, and the stages of it that are rehearsed.

    Attributes:
        waits: the most places in a step where the host waits for the GPU.
    """

    name: str
    choices: dict[str, Any]
    waits: int
    stages: tuple[int, ...] = (0,)
    gpus_per_node: int = 8
    marks: tuple[Any, ...] = field(default=())

    def __str__(self) -> str:
        return self.name


BASE_1B = {"model": "llama-1b", "seq_len": 2048, "global_batch": 16, "micro_batch": 1}

CELLS = [
    Cell("1b-zero1-pp2-dp4-stage1", {**BASE_1B, "zero": 1, "pipeline": 2}, 6, (1,)),
    # The largest gradient, the embedding's, comes when the activations of its micro-batch are gone.
    Cell(
        "1b-zero1-pp2-dp4-stage0", {**BASE_1B, "zero": 1, "pipeline": 2}, 6, (0,), marks=(pytest.mark.heavy,)
    ),
]


@pytest.mark.parametrize("cell", [pytest.param(cell, id=str(cell), marks=cell.marks) for cell in CELLS])
def test_the_plan_holds(cell: Cell, rehearse: Rehearse) -> None:
    result = rehearse(stages=cell.stages, gpus_per_node=cell.gpus_per_node, **cell.choices)
    assert result.differences == ()
    for stage in result.stages:
        assert waits_in_a_step(stage) <= cell.waits, [w for w in stage.waits if w["phase"] == "step 2"]
