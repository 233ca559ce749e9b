"""global batch = micro-batch x accumulation x replicas, and what to do where it does not come out even."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.errors import DstrainError
from dstrain.planning.batch import Batch, make_batch
from tests.support.plans import plan

ASKED = {
    "global_batch": st.integers(1, 300),
    "micro_batch": st.none() | st.integers(1, 40),
    "data_parallel": st.integers(1, 24),
    "pipeline": st.integers(1, 8),
}


def make(global_batch: int, micro_batch: int | None, data_parallel: int = 1, pipeline: int = 1) -> Batch:
    return make_batch(
        global_batch=global_batch,
        micro_batch=micro_batch,
        data_parallel=data_parallel,
        pipeline=pipeline,
        seq_len=128,
        where="here",
    )


@given(**ASKED)
def test_the_identity_holds_or_the_hint_does(
    global_batch: int, micro_batch: int | None, data_parallel: int, pipeline: int
) -> None:
    try:
        batch = make(global_batch, micro_batch, data_parallel, pipeline)
    except DstrainError as error:
        assert error.where == "here" and error.exit_code == 2
        flag, _, rest = (error.hint or "").partition(" ")
        numbers = [int(word) for word in re.findall(r"\d+", rest)]
        assert numbers
        for number in numbers:
            if flag == "--global-batch":
                batch = make(number, micro_batch, data_parallel, pipeline)
                # the nearest: fewer than one whole round away
                assert abs(number - global_batch) < data_parallel * (micro_batch or 1)
            else:
                assert flag == "--micro-batch"
                batch = make(global_batch, number, data_parallel, pipeline)
    assert batch.global_batch == batch.micro_batch * batch.accumulation * batch.data_parallel
    assert batch.tokens == batch.global_batch * 128
    assert min(batch.micro_batch, batch.accumulation) >= 1
    if micro_batch is None:
        assert batch.micro_batch <= 8


@pytest.mark.parametrize(
    ("global_batch", "micro_batch", "replicas", "pipeline", "expected"),
    [
        (32, 4, 2, 1, (4, 4)),
        (32, None, 1, 1, (8, 4)),
        (32, None, 2, 1, (8, 2)),
        (32, None, 1, 2, (4, 8)),  # four micro-batches a stage hide the bubble
        (32, None, 1, 4, (2, 16)),
        (8, None, 1, 4, (1, 8)),
        (6, None, 1, 1, (6, 1)),
        (7, None, 7, 1, (1, 1)),
        (22, None, 2, 1, (1, 11)),
        (12, 12, 1, 1, (12, 1)),  # the user's own choice may be large
    ],
)
def test_shares(
    global_batch: int, micro_batch: int | None, replicas: int, pipeline: int, expected: tuple[int, int]
) -> None:
    batch = make(global_batch, micro_batch, replicas, pipeline)
    assert (batch.micro_batch, batch.accumulation) == expected


@pytest.mark.parametrize(
    ("global_batch", "micro_batch", "replicas", "hint"),
    [
        (10, None, 4, "--global-batch 8 or 12"),
        (10, 3, 4, "--global-batch 12"),
        (3, None, 4, "--global-batch 4"),
        (30, 7, 4, "--global-batch 28 or 56"),
        (12, 5, 1, "--micro-batch 1, 2, 3, 4, 6, 12; or another --global-batch"),
        (16, 16, 2, "--micro-batch 1, 2, 4, 8; or another --global-batch"),
    ],
)
def test_refusals_name_what_works(
    global_batch: int, micro_batch: int | None, replicas: int, hint: str
) -> None:
    with pytest.raises(DstrainError) as caught:
        make(global_batch, micro_batch, replicas)
    assert caught.value.hint == hint


def test_in_words_can_be_checked_by_hand() -> None:
    words = make(32, 4, 2).describe()
    assert words == (
        "32 samples per step = 4 per micro-batch x 4 micro-batches x 2 replicas; 32 x 128 = 4,096 tokens per step"
    )
    assert "1 replica;" in make(32, 4, 1).describe()


@pytest.mark.parametrize(("flags", "where"), [({"micro_batch": 5}, "--micro-batch"), ({}, "--global-batch")])
def test_the_refused_choice_is_blamed(flags: dict[str, int], where: str) -> None:
    with pytest.raises(DstrainError) as caught:
        plan(global_batch=32 if flags else 33, data_parallel=2 if not flags else 1, **flags)
    assert caught.value.where == where


def test_dualpipev_needs_two_micro_batches_a_stage() -> None:
    with pytest.raises(DstrainError, match="requires 4 micro-batches") as caught:
        plan(pipeline=2, schedule="dualpipev", global_batch=8, micro_batch=4)
    number = int(re.findall(r"--global-batch (\d+)", caught.value.hint or "")[0])
    made = plan(pipeline=2, schedule="dualpipev", global_batch=number, micro_batch=4)
    assert made.batch.accumulation == 4
