"""`dstrain verify` with launched runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.e2e import Said


@pytest.mark.heavy
@pytest.mark.timeout(900)
def test_verify_finds_zero2_and_zero3_with_a_pipeline_equal(
    place: Path, dstrain: Callable[..., Said]
) -> None:
    layouts = "zero2-pp2,zero3-pp2,zero1-pp2-dualpipev"
    arguments = ["--tiny", "--steps", "4", "--layouts", layouts, "--set", "micro_batch=2"]
    done = dstrain("verify", *arguments, timeout=800)
    assert done.code == 0, done.out + done.err
    [table] = place.glob("runs/verify-*/verify.json")
    rows = json.loads(table.read_text())["layouts"]
    assert [(row["layout"], row["verdict"]) for row in rows] == [
        ("zero2-pp2-dp1", "equal"),
        ("zero3-pp2-dp1", "equal"),
        ("zero1-pp2-dp1-dualpipev", "equal"),
    ]
