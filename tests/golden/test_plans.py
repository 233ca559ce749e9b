"""`dstrain plan --json` and `dstrain config show` give what 0.1 gave."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.golden.cells import CELLS, Cell
from tests.golden.commands import Said
from tests.golden.compare import differences
from tests.golden.plans import config_file, config_of, plan_file, plan_of

every_cell = pytest.mark.parametrize("cell", CELLS, ids=[cell.name for cell in CELLS])


@every_cell
def test_the_plan_is_the_same(cell: Cell, place: Path, dstrain: Callable[..., Said]) -> None:
    stored = json.loads(plan_file(cell).read_text(encoding="utf-8"))
    assert differences(stored, plan_of(cell, dstrain), place=place) == []


@every_cell
def test_deepspeed_is_given_the_same(cell: Cell, place: Path, dstrain: Callable[..., Said]) -> None:
    stored = json.loads(config_file(cell).read_text(encoding="utf-8"))
    assert differences(stored, config_of(cell, dstrain), place=place) == []


def test_nothing_is_stored_that_no_test_reads() -> None:
    for file in (plan_file, config_file):
        stored = {path.name for path in file(CELLS[0]).parent.iterdir()}
        assert stored == {f"{cell.name}.json" for cell in CELLS}
