"""Durations as people write them."""

from __future__ import annotations

import pytest

from dstrain.config.loader import load_config
from dstrain.config.values import seconds
from dstrain.errors import DstrainError


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("90s", 90), ("20m", 1200), ("3h50m", 13_800), ("2d", 172_800), ("1d2h3m4s", 93_784), (" 5m ", 300)],
)
def test_seconds(text: str, wanted: int) -> None:
    assert seconds(text) == wanted


@pytest.mark.parametrize("text", ["", "0s", "5", "m", "1.5h", "5m3h", "-5m", "5 m", "3:50"])
def test_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="not a duration"):
        seconds(text)


def test_a_time_limit_that_is_none_is_refused_with_an_example() -> None:
    with pytest.raises(DstrainError, match="3h50m"):
        load_config(flags={"time_limit": "4 hours"})
    assert load_config(flags={"time_limit": "3h50m"}).config.time_limit_seconds == 13_800
