"""A rehearsed rank's answer against a plan: what counts as different, and what a collective sends."""

from __future__ import annotations

from typing import Any

import pytest

from dstrain.estimate.memory import StageMemory
from dstrain.estimate.traffic import Traffic
from dstrain.report.rehearsal import STEP, compare, sent_bytes, waits_in_a_step

NEED = StageMemory(
    parameters=400_000,
    gradients=800_000,
    optimizer=1_200_000,
    activations=600_000,
    loss=100_000,
    buffers=50_000,
    host=0,
    together=3_000_000,
)
SENT = (
    Traffic("gradients", "inside", 6_000_000, ""),
    Traffic("tied weights", "inside", 1_000_000, ""),
    Traffic("weights", "inside", 1_500_000, ""),
    Traffic("activations", "inside", 300_000, ""),
)


def message(kind: str, elements: int, *, dtype: str = "float32", ranks: int = 4, phase: str = STEP) -> Any:
    return {
        "phase": phase,
        "kind": kind,
        "dtype": dtype,
        "elements": elements,
        "device": "cuda",
        "ranks": ranks,
        "count": 1,
    }


def answer(**changed: Any) -> dict[str, Any]:
    """Of a rank that does exactly what is planned."""
    return {
        "stage": 0,
        "rank": 0,
        "peaks": {
            name: getattr(NEED, name)
            for name in ("parameters", "gradients", "optimizer", "activations", "loss", "buffers")
        },
        "total": NEED.total,
        "phase_totals": {"build": 1_000_000, STEP: NEED.total, "validation": 2_000_000},
        "messages": [
            message("all_reduce", 1_000_000),  # 2 x 3/4 x 4 B
            message("all_reduce", 250_000, ranks=2),
            message("all_gather_into_tensor", 1_000_000, dtype="bfloat16"),
            message("send", 150_000, dtype="bfloat16"),
            message("recv", 150_000, dtype="bfloat16"),
            message("all_reduce", 1),
            message("all_reduce", 9_000_000, phase="validation"),
        ],
        "waits": [{"phase": STEP, "what": "item", "where": "a.py:1", "count": 3}],
        "attention": [],
        "wrong_devices": [],
        "failures": [],
        "fullest": [],
        "seconds": {},
        "host_bytes": 1,
        **changed,
    }


def test_what_is_as_planned_has_no_differences() -> None:
    found = compare(NEED, SENT, answer())
    assert found.differences == ()
    assert [(part.name, part.planned, part.rehearsed) for part in found.traffic] == [
        ("reduced gradients", 7_000_000, 7_000_006),
        ("gathered weights", 1_500_000, 1_500_000),
        ("between stages", 300_000, 300_000),
    ]
    assert waits_in_a_step(found) == 3


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"total": 2_800_000}, "memory: 3 MB planned, 2.8 MB rehearsed, +7.1%"),
        ({"total": 3_300_000}, "memory: 3 MB planned, 3.3 MB rehearsed, -9.1%"),
        (
            {"phase_totals": {"validation": 3_200_000, STEP: NEED.total}},
            "validation takes 3.2 MB, more than the 3 MB",
        ),
        (
            {"phase_totals": {"build": 3_200_000, STEP: NEED.total}},
            None,
        ),  # DeepSpeed's copy, where there is room
        ({"phase_totals": {"build": 6_200_000, STEP: NEED.total}}, "build takes 6.2 MB, more than the 3 MB"),
        (
            {"messages": answer()["messages"][:2] + answer()["messages"][3:]},
            "gathered weights: 1.5 MB planned, 0 bytes",
        ),
        (
            {"messages": [*answer()["messages"], message("broadcast", 1_000_000)]},
            None,  # a plan says nothing of these
        ),
        (
            {"messages": [*answer()["messages"], message("reduce", 1_000_000)]},
            "reduced gradients: 7 MB planned, 10 MB rehearsed",
        ),
        (
            {"wrong_devices": [{"phase": STEP, "what": "all_reduce on cpu", "where": "b.py:2", "count": 1}]},
            "step 2: all_reduce on cpu in a collective that can't reach it (b.py:2)",
        ),
        (
            {"failures": [{"phase": "validation", "error": "RuntimeError: no", "where": "c.py:3"}]},
            "validation fails: RuntimeError: no (c.py:3)",
        ),
    ],
)
def test_what_counts_as_different(changed: dict[str, Any], words: str | None) -> None:
    found = compare(NEED, SENT, answer(**changed)).differences
    if words is None:
        assert found == ()
    else:
        assert len(found) == 1
        assert found[0].startswith(words)


def test_a_rank_that_fails_in_a_step_is_not_compared() -> None:
    failed = answer(
        failures=[{"phase": "step 1", "error": "RuntimeError: two devices", "where": "d.py:4"}],
        peaks={},
        total=0,
        messages=[],
    )
    assert compare(NEED, SENT, failed).differences == ("step 1 fails: RuntimeError: two devices (d.py:4)",)


def test_what_a_ring_sends() -> None:
    assert sent_bytes(message("all_reduce", 100)) == 600
    assert sent_bytes(message("reduce_scatter_tensor", 100)) == 300
    assert sent_bytes(message("all_gather_into_tensor", 100, dtype="bfloat16")) == 150
    assert sent_bytes(message("send", 100, dtype="int64", ranks=8)) == 800
    assert sent_bytes(message("recv", 100)) == 0
    assert sent_bytes(message("all_reduce", 100, ranks=1)) == 0
