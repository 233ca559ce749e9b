"""A training that goes on in another layout is the same training: from A's checkpoint, in B, equal to the unbroken run.

Two things are looked at for each pair. B's state, before it has trained a step, is A's to the bit: B saves at once, and
both checkpoints are read offline. And B's steps are those of a plain loop that was never broken, within the bounds of
`compare`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.distributed.elsewhere import (
    FP32,
    ONE,
    ZERO1_2X2,
    ZERO1_PP2,
    ZERO2_DP2,
    ZERO3_DP2,
    Layout,
    Trained,
    assert_goes_on,
    assert_same_state,
    go_on,
)
from tests.support.distributed.training import Case
from tests.support.distributed.workers import run
from tests.support.sampling import full, heavy

UNTIED = replace(FP32, tied=False)
MOMENTUM = replace(FP32, optimizer="sgd", momentum=0.5)
PLAIN_SGD = replace(FP32, optimizer="sgd")
PART = replace(FP32, freeze=("model.layers.0.*", "model.layers.1.mlp.*"))
TIED_PART = replace(FP32, freeze=("model.embed_tokens.weight", "model.layers.1.mlp.*"))
BF16 = Case(precision="bf16")  # as many steps as the bounds of 16 bits are known for
FP16 = Case(precision="fp16")
MIXTURE = replace(FP32, experts=4)
ADAPTER = replace(FP32, adapter="full")
DORA = replace(FP32, adapter="dora")
OUTER_ADAPTERS = replace(FP32, adapter="outer")
HEAD_BESIDE_ADAPTERS = replace(FP32, adapter="head")

ZERO2_DP4: Layout = {"zero": 2, "data_parallel": 4, "accumulation": 2}
ZERO2_PP2: Layout = {"zero": 2, "pipeline": 2}
ZERO3_2X2: Layout = {"zero": 3, "pipeline": 2, "data_parallel": 2}
DUALPIPEV: Layout = {"zero": 2, "pipeline": 2, "schedule": "dualpipev"}
OFFLOADED: Layout = {"zero": 2, "data_parallel": 2, "offload": "cpu"}

Pair = tuple[Case, Layout, Layout]

SAMPLE: list[Pair] = [
    (FP32, ONE, ZERO1_2X2),
    (FP32, ONE, ZERO3_DP2),
    (FP32, ZERO1_2X2, {"zero": 1, "pipeline": 4}),
    (FP32, ZERO1_2X2, ZERO2_PP2),
    (FP32, ZERO2_DP4, ZERO3_DP2),
    (FP32, ZERO2_DP4, ZERO1_PP2),
    (FP32, ZERO3_DP2, ZERO2_DP2),
    (FP32, DUALPIPEV, {"zero": 0, "data_parallel": 2}),
    (UNTIED, ZERO1_PP2, ONE),
    (MOMENTUM, ZERO1_PP2, {"zero": 3}),
    (MOMENTUM, ZERO1_PP2, {"zero": 0, "pipeline": 2}),
    (PLAIN_SGD, ZERO3_DP2, ZERO1_PP2),
    (PART, ZERO3_DP2, ONE),
    (TIED_PART, ZERO1_PP2, ZERO3_DP2),
    (MIXTURE, ZERO1_PP2, {"zero": 3, "data_parallel": 2, "accumulation": 2}),
    (ADAPTER, ZERO1_PP2, ZERO3_DP2),
    (OUTER_ADAPTERS, ZERO3_DP2, ZERO1_2X2),
]
ADAPTERS: list[Pair] = [
    (DORA, ONE, ZERO1_2X2),
    (HEAD_BESIDE_ADAPTERS, ZERO1_2X2, ONE),
    (ADAPTER, ZERO1_PP2, {"zero": 1, "pipeline": 2, "schedule": "dualpipev"}),
]
COMPILING: list[Pair] = [
    (FP32, OFFLOADED, {"zero": 1}),
    (FP32, ZERO3_DP2, OFFLOADED),
]
MORE: list[Pair] = [
    (FP32, ONE, {"zero": 0, "pipeline": 2}),
    (FP32, ZERO1_2X2, ONE),
    (FP32, ZERO1_2X2, {"zero": 1, "pipeline": 2, "schedule": "dualpipev"}),
    (FP32, ZERO1_2X2, {"zero": 1, "data_parallel": 4}),
    (FP32, ZERO3_DP2, ONE),
    (FP32, ZERO3_DP2, ZERO2_PP2),
    (UNTIED, ZERO1_PP2, ZERO3_DP2),
    (PART, ZERO3_DP2, ZERO2_PP2),
    (FP32, ONE, {"zero": 0, "data_parallel": 4}),
    (FP32, ZERO1_2X2, ZERO3_2X2),
    (FP32, ZERO1_2X2, OFFLOADED),
    (FP32, ZERO3_DP2, {"zero": 3, "data_parallel": 4, "accumulation": 2}),
    (FP32, DUALPIPEV, {"zero": 2, "pipeline": 4}),
    (FP32, OFFLOADED, {"zero": 3, "data_parallel": 2, "offload": "cpu"}),
    (UNTIED, ZERO3_2X2, {"zero": 1, "pipeline": 4}),
    (UNTIED, ZERO3_2X2, ONE),
    (MOMENTUM, ZERO1_2X2, ZERO3_DP2),
    (PART, ZERO3_DP2, ZERO3_2X2),
    (TIED_PART, ZERO3_2X2, ONE),
    (TIED_PART, ONE, ZERO3_2X2),
    (BF16, ZERO1_PP2, ZERO3_DP2),
    (BF16, ZERO1_PP2, ZERO2_DP4),
    (BF16, ZERO3_DP2, {"zero": 1, "pipeline": 2, "schedule": "dualpipev"}),
    (FP16, ZERO1_PP2, ZERO3_DP2),
    (FP16, ZERO3_DP2, ZERO2_PP2),
    (ADAPTER, ZERO2_DP2, ZERO3_2X2),
    (ADAPTER, {"zero": 0, "pipeline": 2}, ZERO2_PP2),
    (DORA, ZERO3_2X2, ZERO2_PP2),
    (HEAD_BESIDE_ADAPTERS, ZERO3_DP2, ZERO1_PP2),
    (replace(BF16, adapter="full"), ZERO1_PP2, ZERO3_DP2),
]


def short_name(of: Case | Layout) -> str:
    if isinstance(of, Case):
        return str(of).removeprefix("zero0-pp1-dp1-").removesuffix("-accum4")
    return "_".join(str(value) for value in of.values())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("trained"))


@pytest.mark.parametrize(
    ("common", "before", "after"), [*SAMPLE, *heavy(*COMPILING), *full(*ADAPTERS, *MORE)], ids=short_name
)
def test_the_training_goes_on(
    common: Case, before: Layout, after: Layout, trained: Trained, tmp_path: Path
) -> None:
    a, b = replace(common, **before), replace(common, **after)
    at_once = tmp_path / "at-once"
    ranks = run(b.world_size, go_on, b, str(trained(a)), str(at_once))
    assert_same_state(trained(a), at_once, b)
    assert_goes_on(b, ranks, a.in_one_process())


def test_the_pairs_are_many_and_differ() -> None:
    pairs = SAMPLE + COMPILING + MORE
    layouts = [(tuple(before.items()), tuple(after.items())) for _, before, after in pairs]
    assert len(pairs) >= 40 and all(before != after for before, after in layouts)
    zeros = {(before["zero"], after["zero"]) for _, before, after in pairs}
    assert zeros >= {(0, 1), (1, 0), (1, 2), (2, 1), (2, 3), (3, 2), (1, 3), (3, 1), (0, 3), (3, 0), (2, 0)}
