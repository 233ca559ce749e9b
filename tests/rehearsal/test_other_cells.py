"""The same for other models: 8B and 70B, mixtures of experts, and families of all kinds."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.rehearsed_cells import CELLS, RehearsedCell, assert_plan_holds, by_effort

OTHERS = [cell for cell in CELLS if cell.model != "llama-1b"]


@pytest.mark.parametrize("cell", by_effort(OTHERS), ids=str)
def test_the_plan_holds(cell: RehearsedCell, folder: Path) -> None:
    assert_plan_holds(cell, folder)
