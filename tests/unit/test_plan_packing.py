"""Packed samples in the plan: refused for what leaks, and what it says of samples that are not packed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dstrain.errors import DstrainError
from dstrain.planning.layout import Host
from dstrain.planning.plan import Machines
from tests.support.plans import DATA, plan, shape

LEAK = "x lets a document see the ones before it"
FLASH: dict[str, Any] = {
    "settings": ("attention=flash_attention_2",),
    "precision": "bf16",
    "machines": Machines((Host("localhost", 1),), "cuda", flash_packages=("flash_attn",)),
}


@pytest.mark.parametrize(
    ("changes", "flags", "words"),
    [
        ({"packing_leak": LEAK}, {}, [LEAK, "--no-pack"]),
        ({"packing_leak": LEAK, "flash_packing_leak": "f"}, {}, [LEAK]),
        (
            {"flash_packing_leak": LEAK},
            FLASH,
            [LEAK, "attention=auto"],
        ),
        (
            {"looks_ahead": "x lets a token see the ones after it"},
            {"pack": False},
            ["after it", "is_decoder"],
        ),
    ],
)
def test_refused(changes: dict[str, Any], flags: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(DstrainError) as caught:
        plan(model=shape(**changes), **flags)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("changes", "flags"),
    [
        ({"packing_leak": LEAK, "flash_packing_leak": LEAK}, {"pack": False}),
        ({"flash_packing_leak": LEAK}, {}),
        ({"flash_packing_leak": LEAK}, FLASH | {"pack": False}),
    ],
)
def test_accepted(changes: dict[str, Any], flags: dict[str, Any]) -> None:
    assert plan(model=shape(**changes), **flags).config["pack"] is flags.get("pack", True)


def test_packed_and_separate_samples_are_different_runs() -> None:
    assert plan().identity != plan(pack=False).identity


@pytest.mark.parametrize(("padding", "said"), [(0.0, False), (0.004, False), (0.31, True)])
def test_padding_is_told(padding: float, said: bool) -> None:
    warnings = plan(data=replace(DATA, padding=padding), pack=False).warnings
    assert any(warning.startswith(f"{padding:.0%} of the tokens are padding") for warning in warnings) is said
