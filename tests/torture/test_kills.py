"""A training of 60 steps that is killed again and again is, in the end, the training that nobody disturbed."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.sampling import full
from tests.support.torture.moments import Moments
from tests.support.torture.runs import SAVE_EVERY, STEPS, Layout, Run, assert_ends_as_unbroken

PIPELINE = Layout(zero=1, pipeline=2, data_parallel=2)
SHARDED = Layout(zero=3, pipeline=1, data_parallel=2)
MORE = [
    Layout(zero=2, pipeline=2, data_parallel=1),
    Layout(zero=1, pipeline=1, data_parallel=2, precision="bf16"),
    Layout(zero=3, pipeline=2, data_parallel=1),
    Layout(zero=2, pipeline=2, data_parallel=2, adapter="lora"),
    Layout(zero=3, pipeline=1, data_parallel=2, adapter="dora"),
]
ADAPTED = Layout(zero=1, pipeline=2, data_parallel=1, adapter="lora")


def kill_again_and_again(run: Run, kills: int, seed: str) -> None:
    moments = Moments(f"{seed} {run.layout}", save_every=SAVE_EVERY)
    in_saves, left_half = 0, 0
    for number in range(kills):
        moment = moments.draw(STEPS - run.newest())
        print(f"{run.attempts + 1:>3}: {moment}", flush=True)
        began = time.monotonic()
        told = run.kill(moment, f"{seed} {run.layout} {number}")
        print(f"     {told}; {time.monotonic() - began:.1f} s", flush=True)
        in_saves += moment.in_a_save
        left_half += "'aside'" in told
    assert in_saves >= kills // 2 - 1
    assert left_half >= kills // 8, "too few kills have met a save"


@pytest.mark.parametrize("layout", [PIPELINE, SHARDED, *full(ADAPTED)], ids=str)
def test_eight_kills(layout: Layout, place: Path, unbroken: Callable[[Layout], Run], seed: str) -> None:
    run = Run(place, f"killed-{layout}", layout)
    kill_again_and_again(run, 8, seed)
    assert_ends_as_unbroken(run, unbroken)


@pytest.mark.torture
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("layout", [PIPELINE, SHARDED, *MORE], ids=str)
def test_twenty_kills(layout: Layout, place: Path, unbroken: Callable[[Layout], Run], seed: str) -> None:
    run = Run(place, f"killed-more-{layout}", layout)
    kill_again_and_again(run, 20, seed)
    assert_ends_as_unbroken(run, unbroken)
