"""The comparison finds what differs, and lets through what the tables name, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from tests.golden import compare
from tests.golden.compare import differences, key_differences, key_paths, normalised

STORED = {
    "dstrain": "0.1.0",
    "config": {"held_out": 0.05, "zero": 2},
    "deepspeed_origins": {"optimizer.lr": "lr (quickstart.yaml:17)"},
    "layout": {"ranks": [{"rank": 0, "spans": [[0, 3]]}, {"rank": 1, "spans": []}]},
    "warnings": ["the data's 94 samples are seen 51.1 times"],
}


def changed(**keys: Any) -> dict[str, Any]:
    return STORED | keys


@pytest.fixture(autouse=True)
def _no_new_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compared here is of 0.1 on both sides."""
    monkeypatch.setattr(compare, "RENAMED", {})
    monkeypatch.setattr(compare, "REWORDED", {})


def test_the_same_is_the_same() -> None:
    assert differences(normalised(STORED), changed(dstrain="0.2.0")) == []
    origin = {"optimizer.lr": "lr (quickstart.yaml:19)"}
    assert differences(normalised(STORED), changed(deepspeed_origins=origin)) == []


@pytest.mark.parametrize(
    "now",
    [
        changed(config={"held_out": 0.05}),
        changed(config={"held_out": 0.05, "zero": 2, "more": None}),
        changed(config={"held_out": 0.05, "zero": 3}),
        changed(config={"held_out": 0.05, "zero": 2.0}),
        changed(config={"held_out": 0.05000000001, "zero": 2}),
        changed(deepspeed_origins={"optimizer.lr": "lr (--lr)"}),
        changed(layout={"ranks": [{"rank": 0, "spans": [[0, 3]]}, {"rank": 1, "spans": [[3, 4]]}]}),
        changed(warnings=["the data's 94 samples are seen 51.2 times"]),
        changed(warnings=[]),
    ],
)
def test_what_differs_is_found(now: dict[str, Any]) -> None:
    assert differences(normalised(STORED), now)


def test_prose_may_be_worded_anew() -> None:
    assert differences(normalised(STORED), changed(warnings=["51.1 epochs over 94 samples"])) == []


def test_what_is_renamed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    now = changed(
        config={"validation": 0.05, "zero": 2},
        layout={"workers": [{"rank": 0, "chunks": [[0, 3]]}, {"rank": 1, "chunks": []}]},
        deepspeed_origins={"optimizer.lr": "learning_rate (quickstart.yaml:17)"},
    )
    assert differences(normalised(STORED), now)
    renamed = {
        "held_out": "validation",
        "layout.ranks.spans": "layout.workers.chunks",
        "layout.ranks": "layout.workers",
    }
    monkeypatch.setattr(compare, "RENAMED", renamed)
    monkeypatch.setattr(compare, "REWORDED", {"lr (": "learning_rate ("})
    assert differences(normalised(STORED), now) == []
    assert key_differences(["held_out", "layout.ranks"], ["layout.workers", "validation"]) == []


@pytest.mark.parametrize("name", ["config.more", "more"])
def test_what_is_new_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    now = changed(config={"held_out": 0.05, "zero": 2, "more": {"a": 1}})
    monkeypatch.setattr(compare, "NEW", {name})
    assert differences(normalised(STORED), now) == []
    assert differences(normalised(STORED), changed(others=1))
    assert key_differences([], ["config.more.a"]) == []


def test_keys_below_what_is_opaque_are_not_told() -> None:
    found = key_paths({"packages": {"torch": "2"}, "a": [{"b": 1}, {"c": {}}]}, opaque=("packages",))
    assert found == ["a.b", "a.c", "packages"]


def test_what_was_false_may_be_the_one_truth_alone() -> None:
    stored = {"origins": {"deepspeed": "default", "lr": "default"}}
    assert differences(stored, {"origins": {"deepspeed": "choices.yaml:13", "lr": "default"}}) == []
    for key, value in (("deepspeed", "--set deepspeed"), ("lr", "choices.yaml:13")):
        assert differences(stored, {"origins": stored["origins"] | {key: value}}) != []
