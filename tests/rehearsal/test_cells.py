"""Ranks of models of 1B: the plan's memory and traffic within 5 % of the rehearsed, waits within a budget."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.rehearsed_cells import CELLS, RehearsedCell, assert_plan_holds, by_effort

SMALL = [cell for cell in CELLS if cell.model == "llama-1b"]


@pytest.mark.parametrize("cell", by_effort(SMALL), ids=str)
def test_the_plan_holds(cell: RehearsedCell, folder: Path) -> None:
    assert_plan_holds(cell, folder)
