"""When a run that failed is started again."""

from __future__ import annotations

import pytest

from dstrain.api.restart_policy import Again, GiveUp, Restarts

SAME_STEP = "it failed again after step"
TOO_OFTEN = "without a new checkpoint"


@pytest.mark.parametrize(
    ("most", "failures", "wanted"),
    [
        (0, [(5, 0)], [""]),
        (1, [(5, 0), (6, 0)], [5.0, TOO_OFTEN]),
        (3, [(5, 0), (5, 0)], [5.0, SAME_STEP]),
        (3, [(5, 0), (7, 0), (6, 0), (8, 0)], [5.0, 10.0, 20.0, TOO_OFTEN]),
        (2, [(5, 0), (15, 10), (25, 20), (35, 30)], [5.0, 5.0, 5.0, 5.0]),
        (2, [(15, 10), (15, 10)], [5.0, SAME_STEP]),
        (2, [(15, 10), (25, 20), (25, 20)], [5.0, 5.0, SAME_STEP]),
        (9, [(step, 0) for step in range(9)], [5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 300.0, 300.0, 300.0]),
    ],
)
def test_restarts(most: int, failures: list[tuple[int, int]], wanted: list[float | str]) -> None:
    restarts = Restarts(most)
    for (step, saved), expected in zip(failures, wanted, strict=True):
        decision = restarts.after_failure(step=step, saved=saved)
        if isinstance(decision, GiveUp):
            assert isinstance(expected, str) and expected in decision.reason
            assert bool(expected) == bool(decision.reason)
        else:
            assert isinstance(decision, Again)
            assert decision.seconds == expected
