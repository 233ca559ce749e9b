"""Adapters on a quantized model: trained in a layout, they are those of transformers, bitsandbytes and PEFT together.

The yardstick is a plain loop over the model that ``from_pretrained`` quantizes (see `yardsticks`).
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.support.distributed.compare import assert_equal
from tests.support.distributed.training import Case, train_in_layout
from tests.support.distributed.workers import run
from tests.support.sampling import full, heavy

FOUR = Case(adapter="4bit", zero=1)
EIGHT = replace(FOUR, adapter="8bit")
CASES = [
    replace(FOUR, pipeline=2),
    *heavy(
        replace(FOUR, zero=3, data_parallel=2),
        replace(FOUR, pipeline=4, zero=2, precision="bf16"),
        replace(EIGHT, pipeline=2, precision="bf16"),
        replace(FOUR, pipeline=2, layers=4, accumulation=4, schedule="dualpipev", checkpointing=True),
    ),
    *full(
        replace(FOUR, zero=0),
        replace(FOUR, zero=0, pipeline=4),
        replace(FOUR, zero=2, data_parallel=2, offload="cpu"),
        replace(FOUR, zero=3, pipeline=2, data_parallel=2, checkpointing=True),
        replace(FOUR, zero=2, data_parallel=2, precision="fp16"),
        replace(FOUR, tied=False, pipeline=2, data_parallel=2, zero=2),
        replace(FOUR, experts=4, pipeline=2),
        replace(EIGHT, zero=0),
        replace(EIGHT, zero=2, pipeline=4),
        replace(EIGHT, zero=2, data_parallel=2),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_layout_trains_what_one_process_trains(case: Case) -> None:
    assert_equal(case, run(case.world_size, train_in_layout, case))
