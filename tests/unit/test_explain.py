"""``dstrain plan --explain``: every key has a meaning, a value, a reason and an origin."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dstrain.cli.showing.explanation import format_explanation
from dstrain.config.deepspeed_keys import GONE, all_keys, find
from dstrain.config.schema import field_names
from dstrain.config.values import leaves
from dstrain.errors import DstrainError
from dstrain.planning.deepspeed.keys import AS_DEFAULT, KEYS
from dstrain.planning.explain import Explanation, explain, keys_meant
from dstrain.planning.plan import Plan
from tests.support.plans import plan

CHOICES: list[dict[str, Any]] = [
    {"zero": 0},
    {"zero": 1, "precision": "bf16", "pipeline": 2},
    {"zero": 2, "precision": "fp16", "offload": "cpu"},
    {"zero": 3, "offload": "nvme", "settings": ("nvme_path=/disk", "optimizer=sgd")},
    {"zero": 3, "precision": "fp16", "settings": ("deepspeed.comms_logger.enabled=true",)},
]


def one(made: Plan, name: str) -> Explanation:
    (found,) = explain(made, name)
    return found


@pytest.mark.parametrize("choices", CHOICES, ids=["zero0", "bf16", "offload", "nvme", "own"])
def test_every_key_of_a_plan_is_explained_by_what_is_in_it(choices: dict[str, Any]) -> None:
    made = plan(**choices)
    for path, value in leaves(made.deepspeed):
        dotted = ".".join(path)
        found = one(made, f"deepspeed.{dotted}")
        assert (found.key, found.value, found.set) == (f"deepspeed.{dotted}", value, True)
        assert found.origin == made.deepspeed_origins[dotted]
        assert found.does and "does not say" not in found.does, dotted
        node = find(path)
        if found.why == AS_DEFAULT:
            assert node and value == node["default"], (
                f"{dotted} is not DeepSpeed's default: give it a reason in KEYS"
            )
        if found.origin.startswith("--set"):
            assert found.why == "you set it"


def test_every_reason_is_of_a_key_that_some_fragment_sets() -> None:
    written = {path for choices in CHOICES for path, _ in leaves(plan(**choices).deepspeed)}
    assert {path for path, key in KEYS.items() if key.why} <= written


@pytest.mark.parametrize("key", field_names())
def test_every_key_of_dstrain_is_explained(key: str) -> None:
    found = explain(plan(), key)[0]
    assert found.key == key and found.origin and found.why and found.takes
    assert format_explanation(found).startswith(key)


def test_every_key_of_deepspeed_can_be_asked_for() -> None:
    made = plan()
    for path, _ in all_keys():
        for found in explain(made, f"deepspeed.{'.'.join(path)}"):
            json.dumps(found.to_record())
            assert format_explanation(found)


def test_a_value_that_follows_says_from_what() -> None:
    made = plan(zero=2, data_parallel=2)
    stage = one(made, "deepspeed.zero_optimization.stage")
    assert stage.why == "it follows from zero (--zero)" and stage.decided_by == "zero = 2 (--zero)"
    bucket = one(made, "reduce_bucket_size")
    assert bucket.key == "deepspeed.zero_optimization.reduce_bucket_size"
    assert "largest stage" in bucket.why and bucket.default == 500_000_000
    assert ("zero_optimization.stage", 2) in one(made, "zero").decides


def test_what_is_derived_is_shown_as_it_came_out() -> None:
    made = plan(data_parallel=2)
    assert one(made, "micro_batch").value == made.batch.micro_batch
    assert one(made, "data_parallel").value == 2


def test_a_key_that_nobody_set() -> None:
    found = one(plan(), "zero_optimization.round_robin_gradients")
    assert found.set  # zero 1 writes it
    found = one(plan(zero=0), "round_robin_gradients")
    assert (found.set, found.value, found.why) == (False, False, "neither dstrain nor you set it")
    assert "not set: false" in format_explanation(found)


def test_a_name_of_both_is_explained_twice() -> None:
    assert keys_meant("gradient_clipping") == ["gradient_clipping", "deepspeed.gradient_clipping"]
    assert keys_meant("deepspeed.gradient_clipping") == ["deepspeed.gradient_clipping"]


def test_names_are_found_by_their_last_part_and_their_aliases() -> None:
    assert keys_meant("overlap_comm") == ["deepspeed.zero_optimization.overlap_comm"]
    assert keys_meant("bfloat16.enabled") == ["deepspeed.bf16.enabled"]


def test_a_removed_key_says_what_became_of_it() -> None:
    assert "Apex" in one(plan(), "amp").does
    assert all(explain(plan(), ".".join(path)) for path, node in all_keys() if GONE & set(node))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gradient_cliping", "did you mean gradient_clipping?"),
        ("overlap_com", "did you mean zero_optimization.overlap_comm or"),
        ("enabled", "bf16.enabled"),
        ("xyzzy", "config schema"),
        ("", "config schema"),
    ],
)
def test_no_such_key(name: str, words: str) -> None:
    with pytest.raises(DstrainError) as caught:
        keys_meant(name)
    assert caught.value.where == "--explain" and words in (caught.value.hint or "")
