"""Estimated time and memory of stages, with the numbers that `dstrain.model.measuring.measure` finds for llama-1b.

tests/model/test_model_measure.py holds the measurement to these numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from dstrain.config.schema import RunConfig
from dstrain.errors import DstrainError
from dstrain.estimate.memory import Memory, estimate, micro_batches_in_flight, state_bytes
from dstrain.estimate.stage_time import attended_share, layer_times, stage_shares
from dstrain.planning.buffer_sizes import loss_chunk
from dstrain.planning.layout import Host, Layout
from dstrain.planning.model_shape import Layer, ModelShape, Tied
from dstrain.planning.partition import cut_by_cost
from dstrain.planning.plan import Machines
from tests.support.plans import DATA, plan

GB = 10**9
EMBEDDING = 128_256 * 2048
BLOCK = 60_821_504
LLAMA_1B = ModelShape(
    model_type="llama",
    hidden_size=2048,
    vocab_size=128_256,
    max_positions=131_072,
    layers=(
        Layer("embed", "embed", EMBEDDING, 0),
        *(
            Layer(f"block {i}", "block", BLOCK, 121_634_816, {}, 8192.0, (108_680, 200_840))
            for i in range(16)
        ),
        Layer("head", "head", EMBEDDING + 2048, 2 * EMBEDDING),
    ),
    tied=(Tied("model.embed_tokens.weight", EMBEDDING, (0, 17)),),
    total_parameters=16 * BLOCK + EMBEDDING + 2048,
    pipeline_refusal=None,
)


def blocks(cut: Sequence[int] | None) -> list[int]:
    assert cut is not None
    counts = [end - start for start, end in pairwise(cut)]
    return [counts[0] - 1, *counts[1:-1], counts[-1] - 1]


def llama(machines: Machines | None = None, **flags: Any) -> Any:
    choices: dict[str, Any] = {"pipeline": 4, "seq_len": 4096, "micro_batch": 1, "precision": "bf16"}
    found = {"machines": machines} if machines else {}
    return plan(model=LLAMA_1B, data=replace(DATA, seq_len=4096), **found, **(choices | flags))


def fullest_rank(made: Any) -> int:
    return max(need.total for need in made.stage_memory)


def gpus(count: int, gigabytes: float | None) -> Machines:
    memory = None if gigabytes is None else int(gigabytes * GB)
    return Machines((Host("localhost", count),), "cuda", memory_bytes=memory)


# --- time


@pytest.mark.parametrize(
    ("recomputed", "expected"),
    [
        ((False, False), [5, 5, 5, 1]),
        # blocks take 4 forwards, the head 3: it shrinks beside them
        ((True, False), [4, 5, 5, 2]),
        ((True, True), [5, 5, 5, 1]),
        # the head takes 4 forwards, blocks 3: it has a stage for itself
        ((False, True), [5, 5, 6, 0]),
    ],
)
def test_the_cut_follows_what_is_recomputed(recomputed: tuple[bool, bool], expected: list[int]) -> None:
    again, head = recomputed
    times = layer_times(LLAMA_1B, seq_len=4096, attended=0.5, blocks_recomputed=again, head_recomputed=head)
    assert blocks(cut_by_cost(times, 4)) == expected


def test_the_head_of_llama_1b_costs_as_much_as_3_8_blocks() -> None:
    times = layer_times(LLAMA_1B, seq_len=4096, attended=0.5)
    assert times[-1] / times[1] == pytest.approx(3.80, abs=0.01)
    assert times[0] == 1
    # with a mask, attention computes the whole square
    times = layer_times(LLAMA_1B, seq_len=4096)
    assert times[-1] / times[1] == pytest.approx(3.38, abs=0.01)
    assert times[1] == 1 + 3 * 4096 * (121_634_816 + 8192 * 4096)


def test_by_time_is_more_even_than_by_parameters_and_by_number() -> None:
    times = layer_times(LLAMA_1B, seq_len=4096, attended=0.5)

    def imbalance(cut: tuple[int, ...]) -> float:
        return max(stage_shares(Layout((Host("a", 4),), 4, 1, cut), times))

    assert imbalance((0, 6, 11, 16, 18)) == pytest.approx(1.01, abs=0.005)
    assert imbalance((0, 3, 9, 15, 18)) == pytest.approx(1.21, abs=0.005)
    assert imbalance((0, 5, 9, 13, 18)) == pytest.approx(1.58, abs=0.005)


def test_a_large_vocabulary_s_logits_are_recomputed() -> None:
    assert loss_chunk(1, 4096, 128_256) == 512  # tokens, of 513 kB of logits each: 523, but for whole tiles
    assert loss_chunk(1, 512, 128_256) == 0
    assert loss_chunk(1, 4096, 16_384) == 0  # 256 MiB to the byte


@pytest.mark.parametrize(
    ("choices", "share"),
    [
        ({}, 1.0),
        ({"pack": False}, 0.5),
        ({"pack": False, "attention": "eager"}, 1.0),
        ({"attention": "flash_attention_2"}, 0.5),
    ],
)
def test_share_of_the_square_that_attention_computes(choices: dict[str, Any], share: float) -> None:
    assert attended_share(RunConfig(**choices)) == share


def test_the_plan_knows_each_stage_s_time() -> None:
    made = llama(pack=False, seq_len=512)
    assert sum(made.stage_time) == pytest.approx(4)
    assert made.imbalance == made.imbalance_of_auto == max(made.stage_time)
    worse = llama(pack=False, seq_len=512, partition="uniform")
    assert blocks(worse.layout.cut) == [4, 4, 4, 4]
    assert worse.imbalance > 1.5 and worse.imbalance_of_auto == made.imbalance


def test_dualpipev_evens_the_sums_of_ranks() -> None:
    made = llama(pipeline=2, schedule="dualpipev", seq_len=512, pack=False)
    # 16 blocks and a head of 4.1: 10 and 6 + 4.1
    assert made.imbalance == pytest.approx(1.01, abs=0.01)
    asked = llama(pipeline=2, schedule="dualpipev", seq_len=512, pack=False, partition="4,4,4,4")
    assert blocks(asked.layout.cut) == [4, 4, 4, 4]
    assert asked.imbalance > 1.1


# --- partition as asked


@pytest.mark.parametrize(
    ("partition", "expected"),
    [
        ("parameters", [2, 6, 6, 2]),
        ("uniform", [4, 4, 4, 4]),
        ("5,5,5,1", [5, 5, 5, 1]),
        ("0,8,8,0", [0, 8, 8, 0]),
    ],
)
def test_cuts_as_asked(partition: str, expected: list[int]) -> None:
    assert blocks(llama(partition=partition).layout.cut) == expected


@pytest.mark.parametrize("partition", ["auto", "parameters", "uniform", "16"])
def test_one_stage_holds_all(partition: str) -> None:
    assert llama(partition=partition, pipeline=1).layout.cut == (0, 18)


@pytest.mark.parametrize(
    ("partition", "flags", "words", "hint"),
    [
        ("unifrom", {}, "'unifrom'", "did you mean uniform?"),
        ("5;5;5;1", {}, "'5;5;5;1'", "5,5,5,1"),
        ("5,5,6", {}, "3 numbers, but --pipeline 4 needs 4", "4,4,4,4"),
        ("8,8", {"pipeline": 2, "schedule": "dualpipev"}, "needs 4 (two a rank with dualpipev)", "4,4,4,4"),
        ("8,0,7,1", {}, "leaves stage 2 of 4 without a layer", "may have 0 blocks"),
        ("5,5,5,2", {}, "has 17 blocks in total, but the model has 16", "--partition 4,4,4,4"),
        ("16", {}, "1 number, but", "4,4,4,4"),
    ],
)
def test_partitions_that_do_not_fit_the_model(
    partition: str, flags: dict[str, Any], words: str, hint: str
) -> None:
    with pytest.raises(DstrainError) as caught:
        llama(partition=partition, **flags)
    assert caught.value.where == "--partition"
    assert words in caught.value.message and hint in (caught.value.hint or "")


# --- memory


@pytest.mark.parametrize(("zero", "gigabytes"), [(1, 31.4), (2, 16.6), (3, 1.9)])
def test_states_of_the_zero_paper_s_example(zero: int, gigabytes: float) -> None:
    """7.5 billion parameters on 64 GPUs: Rajbhandari et al. 2020, figure 1."""
    assert 7.5 * state_bytes(RunConfig(zero=zero, precision="bf16"), 64).trained == pytest.approx(
        gigabytes, abs=0.05
    )


def test_states_of_other_choices() -> None:
    def trained(replicas: int = 1, device_is_host: bool = False, **choices: Any) -> float:
        return state_bytes(RunConfig(**choices), replicas, device_is_host=device_is_host).trained

    assert trained(precision="bf16") == 16  # 120 GB for 7.5 billion parameters
    assert trained(zero=0) == 16 and trained(zero=1) == 20
    assert trained(zero=0, optimizer="sgd") == 8 and trained(zero=0, optimizer="sgd", momentum=0.9) == 12
    assert trained(zero=1, precision="bf16", offload="cpu") == 4
    assert trained(zero=1, precision="bf16", offload="cpu", device_is_host=True) == 16
    assert state_bytes(RunConfig(zero=3, precision="bf16"), 4).frozen == 0.5


def test_micro_batches_in_flight() -> None:
    assert micro_batches_in_flight(4, "1f1b", 8) == (4, 3, 2, 1)
    assert micro_batches_in_flight(4, "1f1b", 2) == (2, 2, 2, 1)
    assert micro_batches_in_flight(4, "dualpipev", 8) == (4.5,) * 4
    assert micro_batches_in_flight(1, "1f1b", 8) == (1,)


def test_a_stage_s_bytes() -> None:
    memory = Memory(
        states=(10, 20, 30), once=(0, 0, 5), kept=(0, 4, 0), boundary=1, working=100, in_flight=(3, 2)
    )
    assert memory.of_stage(0, (range(2),)) == 100 + 30 + 3 * (1 + 4)
    assert memory.of_stage(1, (range(2, 3),)) == 100 + 35 + 2 * 1
    assert memory.of_stage(0, (range(1), range(2, 3))) == 100 + 45 + 3 * 2


def test_what_choices_do_to_the_estimate() -> None:
    def fullest(**choices: Any) -> int:
        return fullest_rank(llama(gpus(4, None), **choices))

    plain = fullest()
    assert fullest(activation_checkpointing=True) < plain
    assert fullest(precision="fp32") > plain
    assert fullest(micro_batch=2) > plain
    assert fullest(offload="cpu") < plain
    one = estimate(RunConfig(precision="bf16"), LLAMA_1B, replicas=1, micro_batch=1, accumulation=1)
    # a tied weight that one rank holds counts once
    assert sum(one.states) == 18 * LLAMA_1B.total_parameters


def test_frozen_parameters_have_neither_gradients_nor_states() -> None:
    model = replace(
        LLAMA_1B, layers=tuple(replace(x, tensors={f"{x.name}.w": x.parameters}) for x in LLAMA_1B.layers)
    )
    config = RunConfig(precision="bf16", freeze=["block *"])
    found = estimate(config, model, replicas=1, micro_batch=1, accumulation=1)
    assert found.states[1] == 2 * BLOCK and found.states[0] == 18 * EMBEDDING


@pytest.mark.parametrize("flags", [{"pack": False}, {"pipeline": 2, "schedule": "dualpipev", "zero": 1}])
def test_less_memory_moves_the_cut_and_too_little_is_told(flags: dict[str, Any]) -> None:
    """The memory is shrunk step by step: the cut fits as long as one is found, and gets no faster."""
    stages = flags.get("pipeline", 4)
    free = llama(gpus(stages, None), **flags)
    need, slowest, moved = fullest_rank(free) / GB, free.imbalance, False
    for tenths in range(120, 40, -2):
        made = llama(gpus(stages, need * tenths / 100), **flags)
        limit = 0.92 * need * tenths / 100 * GB
        warned = any("most of the memory" in warning for warning in made.warnings)
        assert warned == (fullest_rank(made) > limit)
        if warned:
            assert made.layout.cut == free.layout.cut
            assert any("no partition that fits was found" in warning for warning in made.warnings)
        else:
            assert made.imbalance >= slowest - 1e-9
            slowest, moved = made.imbalance, moved or made.layout.cut != free.layout.cut
    assert moved


def test_a_cut_that_was_asked_for_is_kept_though_it_does_not_fit() -> None:
    made = llama(gpus(4, 4), partition="1,1,1,13")
    assert blocks(made.layout.cut) == [1, 1, 1, 13]
    assert "stage 3" in made.memory_verdict and made.memory_verdict.startswith("does not fit")
    assert any("most of the memory" in warning and "--partition auto" in warning for warning in made.warnings)


def test_cpus_share_a_machine_s_memory_so_that_no_cut_is_ruled_out() -> None:
    small = Machines((Host("localhost", 0),), "cpu", memory_bytes=GB)
    made = llama(small)
    assert made.layout.cut == llama().layout.cut
    assert made.memory_verdict.startswith("does not fit: the ranks of a host need about")
    [warning] = [warning for warning in made.warnings if "most of the memory" in warning]
    assert "no partition that fits" not in warning
