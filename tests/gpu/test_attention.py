"""Each attention kernel that is there trains, with rows of several documents, what sdpa trains on the CPU."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from dstrain.api.machines import is_installed
from dstrain.planning.attention import FLASH_PACKAGES
from tests.support.distributed.compare import assert_equal, difference, reference
from tests.support.distributed.training import Case, train_in_layout
from tests.support.distributed.workers import run
from tests.support.gpu.machine import need

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("attention", ["eager", "flex_attention", *FLASH_PACKAGES])
def test_a_kernel_equals_sdpa(attention: str, record_property: pytest.RecordProperty) -> None:
    need(1)
    package = FLASH_PACKAGES.get(attention)
    if package and not is_installed(package):
        pytest.skip(f"{package} is not installed")
    case = Case(zero=1, precision="bf16", attention=attention)
    ranks = run(1, train_in_layout, case, timeout=400)
    record_property("difference", asdict(difference(ranks, reference(case.in_one_process()))))
    assert_equal(case, ranks)
