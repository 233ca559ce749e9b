"""Which attention kernel a call would get on a GPU."""

from __future__ import annotations

import pytest
import torch

from dstrain.rehearsal.attention_kernels import choose_kernel

MASK = torch.ones(1, 1, 16, 16, dtype=torch.bool, device="meta")
ADA, TURING = (8, 9), (7, 5)


def choose(
    *,
    dtype: torch.dtype = torch.bfloat16,
    head: int = 64,
    keys: int = 8,
    mask: torch.Tensor | None = None,
    gqa: bool = False,
    capability: tuple[int, int] = ADA,
) -> tuple[str, str]:
    query = torch.empty(2, 8, 16, head, dtype=dtype, device="meta")
    key = torch.empty(2, keys, 16, head, dtype=dtype, device="meta")
    return choose_kernel(query, key, key, mask, gqa, capability)


@pytest.mark.parametrize(
    ("call", "kernel", "reason"),
    [
        ({}, "flash", ""),
        ({"head": 256, "keys": 2, "gqa": True}, "flash", ""),
        ({"mask": MASK}, "memory-efficient", "not flash: it has a mask"),
        ({"dtype": torch.float32}, "memory-efficient", "not flash: it is in float32"),
        ({"head": 264}, "memory-efficient", "not flash: its head size is 264"),
        ({"dtype": torch.float16, "capability": TURING}, "memory-efficient", "not flash: compute capability 7.5 is"),
        ({"capability": TURING}, "math", "not memory-efficient: bfloat16 needs compute capability 8.0"),
        ({"mask": MASK, "keys": 2, "gqa": True}, "math", "it has fewer heads of keys than of queries"),
        ({"mask": MASK, "head": 20}, "math", "its head size 20 is no multiple of 8"),
        ({"dtype": torch.float32, "head": 20}, "memory-efficient", "not flash: it is in float32"),
    ],
)  # fmt: skip
def test_kernels(call: dict[str, object], kernel: str, reason: str) -> None:
    found, why = choose(**call)  # type: ignore[arg-type]
    assert found == kernel
    assert reason in why
