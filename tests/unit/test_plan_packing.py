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


def test_padding_of_conversations_is_not_blamed_on_a_choice() -> None:
    chat = replace(DATA, padding=0.03, format="messages", trained_tokens=400)
    [told] = [line for line in plan(data=chat).warnings if "padding" in line]
    assert (
        told
        == "3% of the tokens are padding: no conversation is cut, and a larger --seq-len would leave less"
    )


def test_keys_of_conversations_do_nothing_for_texts() -> None:
    def told(**changes: Any) -> list[str]:
        made = plan(settings=("train_on=last", "too_long=cut"), data=replace(DATA, **changes))
        return [line for line in made.warnings if "no effect" in line]

    assert told() == ["train_on and too_long have no effect: the data are texts, and no conversations"]
    assert told(format="messages", trained_tokens=400) == []
