"""Each accepted layout trains on GPUs what a plain loop trains on the CPU.

The bound is that of the tests on CPUs: in fp32 1e-5, in 16 bits twice the spread of plain loops that sum in other
orders.
"""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest

from dstrain.launch.devices import has_async_io
from tests.support.distributed.compare import assert_equal, difference, reference
from tests.support.distributed.training import Case, train_in_layout
from tests.support.distributed.workers import run
from tests.support.gpu.machine import need
from tools.layouts_page import rows

pytestmark = pytest.mark.gpu


def cases() -> list[Case]:
    """Every accepted row of docs/layouts.md, with one replica and with two, and some with recomputation."""
    found = []
    for row in rows():
        if row.refusal is not None or (row.offload == "nvme" and not has_async_io()):
            continue
        case = Case(
            zero=row.zero,
            pipeline=row.pipeline,
            precision=row.precision,
            schedule=row.schedule,
            offload=row.offload,
        )
        found += [case, replace(case, data_parallel=2)]
        if row.offload == "none" and row.precision == "bf16":
            found.append(replace(case, checkpointing=True))
    return found


@pytest.mark.parametrize("case", cases(), ids=str)
def test_a_layout_trains_as_the_cpu(
    case: Case, record_property: pytest.RecordProperty, tmp_path_factory: pytest.TempPathFactory
) -> None:
    need(case.world_size)
    placed = replace(case, nvme_path=str(tmp_path_factory.mktemp("nvme"))) if case.offload == "nvme" else case
    ranks = run(case.world_size, train_in_layout, placed, timeout=400)
    record_property("difference", asdict(difference(ranks, reference(case.in_one_process()))))
    assert_equal(case, ranks)
