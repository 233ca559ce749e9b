"""One place for all runs under torture, and the unbroken run of each layout."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.torture.runs import Layout, Run, write_materials


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("torture")
    write_materials(folder)
    return folder


@pytest.fixture(scope="session")
def unbroken(place: Path) -> Callable[[Layout], Run]:
    """The run of a layout that nobody disturbs."""
    made: dict[Layout, Run] = {}

    def of(layout: Layout) -> Run:
        if layout not in made:
            run = Run(place, f"unbroken-{layout}", layout)
            run.finish()
            made[layout] = run
        return made[layout]

    return of


@pytest.fixture
def seed() -> str:
    """Drawn anew each time; shown where a test fails, and repeated with TORTURE_SEED."""
    drawn = os.environ.get("TORTURE_SEED") or str(random.SystemRandom().randrange(10**6))
    print(f"TORTURE_SEED={drawn}")
    return drawn
