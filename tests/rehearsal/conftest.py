"""A rehearsal through the Python API, of GPUs that no machine of the tests has."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from dstrain.api.rehearsing import RehearsalResult
from tests.support.rehearsed_cells import rehearse_on_h100

Rehearse = Callable[..., RehearsalResult]


@pytest.fixture(scope="session")
def rehearse(tmp_path_factory: pytest.TempPathFactory) -> Rehearse:
    """``rehearse(stages=.., gpus_per_node=.., KEY=..)``: on H100 GPUs, in bf16; the data are enough for long rows."""
    return partial(rehearse_on_h100, tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For the data and the models of cells."""
    return tmp_path_factory.mktemp("cells")
