"""The same with real interpreters all along: `dstrain`, its guard, DeepSpeed's launcher and the ranks.

Nothing is written down inside the ranks: losses, norms and weights that are equal to the bit stand for the samples.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.torture.attempt import ALL, COMMAND, LAUNCHER, RANK
from tests.support.torture.moments import STEP, Moment
from tests.support.torture.runs import (
    Layout,
    Run,
    assert_equal_metrics,
    assert_equal_weights,
    assert_tidy,
)

LAYOUT = Layout(zero=3, pipeline=1, data_parallel=2)


@pytest.mark.heavy
@pytest.mark.timeout(900)
def test_four_kills(place: Path, unbroken: Callable[[Layout], Run], seed: str) -> None:
    run = Run(place, "real", LAYOUT, real=True)
    for moment in (
        Moment(STEP, RANK, 0.0, steps=7),
        Moment("aside", ALL, 0.0),
        Moment("named", LAUNCHER, 0.0),
        Moment("files", COMMAND, 0.0),
    ):
        before = run.newest()
        print(f"{moment}: {run.kill(moment, seed)}", flush=True)
        assert run.newest() >= before
    assert run.newest() > 0
    run.finish()
    assert_equal_metrics(run, unbroken(LAYOUT))
    assert_equal_weights(run, unbroken(LAYOUT))
    assert_tidy(run)
