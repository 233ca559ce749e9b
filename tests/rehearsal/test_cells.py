"""Ranks of true size: the plan's memory and traffic within 5 % of the rehearsed, waits within a budget."""

from __future__ import annotations

from pathlib import Path

import pytest

from dstrain.report.rehearsal import waits_in_a_step
from tests.support.rehearsed_cells import CELLS, RehearsedCell, rehearse_cell
from tests.support.sampling import full, heavy

_MARKED = {"test": lambda cell: [cell], "heavy": heavy, "full": full}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cells")


@pytest.mark.parametrize("cell", [each for cell in CELLS for each in _MARKED[cell.effort](cell)], ids=str)
def test_the_plan_holds(cell: RehearsedCell, folder: Path) -> None:
    result = rehearse_cell(cell, folder)
    unknown = [
        difference
        for stage in result.stages
        for difference in stage.differences
        if not (cell.known and difference.startswith(cell.known))
    ]
    assert unknown == []
    for stage in result.stages:
        budget = cell.usual_waits if cell.waits is None else cell.waits
        assert waits_in_a_step(stage) <= budget, [w for w in stage.waits if w["phase"] == "step 2"]
