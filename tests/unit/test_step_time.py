"""The time of a step and its traffic: by hand, by published numbers, and what must hold for all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dstrain.config.schema import RunConfig
from dstrain.estimate.device import Device, Link, find_device
from dstrain.estimate.time import StepTime, stages_waiting, step_time
from dstrain.estimate.traffic import stage_traffic, traffic
from dstrain.planning.batch import Batch
from dstrain.planning.layout import Host, Layout
from dstrain.planning.model_shape import Layer, ModelShape, Tied
from dstrain.planning.partition import cut_by_cost

FREE = Link(1e30, 0.0)
# It computes 1 TFLOP/s, and all else takes no time.
IDEAL = Device(
    name="ideal", kind="cuda", memory_bytes=None, flops={"bf16": 1e12, "fp32": 1e12}, utilisation=1.0,
    memory_bandwidth=1e30, host_link=FREE, inside=FREE, between=FREE, gpus_per_node=8,
    precisions=("bf16", "fp32"), layer_overhead=0.0, source="made up",
)  # fmt: skip


def model(layers: int, parameters: int = 1000, flops: int = 10**6, tied: int = 0) -> ModelShape:
    """Layers that are all alike, embedding and head too: stages of equal numbers of them are even."""
    kinds = ["embed", *["block"] * (layers - 2), "head"]
    ties = (Tied("embed.weight", tied, (0, layers - 1)),) if tied else ()
    return ModelShape(
        "alike", 64, 100, None, tuple(Layer(f"layer {i}", kind, parameters, flops) for i, kind in enumerate(kinds)),
        ties, layers * parameters - tied, None,
    )  # fmt: skip


def layout(
    pipeline: int, replicas: int, layers: int, *, slots: int | None = None, schedule: str = "1f1b"
) -> Layout:
    """On hosts of so many slots; on one host without them."""
    world = pipeline * replicas
    slots = slots or world
    hosts = tuple(Host(f"n{number}", slots) for number in range(world // slots))
    chunks = pipeline * (2 if schedule == "dualpipev" and pipeline > 1 else 1)
    return Layout(hosts, pipeline, replicas, tuple(range(0, layers + 1, layers // chunks)), schedule)


def batch(accumulation: int, replicas: int = 1, micro_batch: int = 2, seq_len: int = 32) -> Batch:
    return Batch(accumulation * replicas * micro_batch, micro_batch, accumulation, replicas, seq_len)


def bytes_of(
    shape: ModelShape, made: Layout, of: Batch, stage: int = 0, **choices: Any
) -> dict[str, tuple[str, int]]:
    config = RunConfig(**{"precision": "bf16", **choices})
    return {sent.what: (sent.link, sent.bytes) for sent in stage_traffic(config, shape, made, of, stage)}


# --- time


@pytest.mark.parametrize(("stages", "micro_batches"), [(2, 1), (2, 8), (4, 4), (4, 32), (8, 64)])
def test_the_bubble_of_even_stages(stages: int, micro_batches: int) -> None:
    """(p - 1) / m of the ideal: Narayanan et al. 2021, section 2.2.1."""
    config = RunConfig(precision="bf16", pipeline=stages)
    found = step_time(config, model(16), layout(stages, 1, 16), batch(micro_batches), IDEAL)
    assert found.bubble / found.compute == pytest.approx((stages - 1) / micro_batches)
    assert found.bubble_fraction == pytest.approx((stages - 1) / (micro_batches + stages - 1))
    assert found.total == pytest.approx(found.compute + found.bubble)


def test_a_stage_that_is_slower_is_what_counts() -> None:
    config = RunConfig(precision="bf16", pipeline=2)
    made = Layout((Host("a", 2),), 2, 1, (0, 3, 4))
    found = step_time(config, model(4), made, batch(10), IDEAL)
    forward = 2 * 32 * 10**6  # FLOPs of a layer, for a micro-batch of 2 samples
    assert found.compute == pytest.approx(10 * 3 * 3 * forward / 1e12)
    assert found.bubble == pytest.approx(3 * forward / 1e12)


def test_dualpipev_waits_less_than_1f1b_but_not_half() -> None:
    """tests/distributed/test_traffic.py plays DeepSpeed's instructions through."""
    assert stages_waiting(4, "1f1b") == 3
    assert stages_waiting(4, "dualpipev") == pytest.approx(7 / 3)
    assert stages_waiting(1, "dualpipev") == 0
    config = RunConfig(precision="bf16", pipeline=4, schedule="dualpipev")
    found = step_time(config, model(16), layout(4, 1, 16, schedule="dualpipev"), batch(8), IDEAL)
    assert found.bubble / found.compute == pytest.approx(7 / 3 / 8)


def test_recomputed_blocks_take_a_forward_pass_more() -> None:
    shape, plain = model(6), RunConfig(precision="bf16")
    again = RunConfig(precision="bf16", activation_checkpointing=True)
    times = [step_time(c, shape, layout(1, 1, 6), batch(1), IDEAL) for c in (plain, again)]
    assert times[1].compute / times[0].compute == pytest.approx((4 * 4 + 2 * 3) / (6 * 3))
    # which does not make the model any larger: PaLM's MFU falls
    assert times[1].mfu == pytest.approx(times[0].mfu * 18 / 22)
    assert times[0].mfu == pytest.approx(1)


def test_small_layers_wait_for_their_kernels() -> None:
    """A GPU's kernels are launched ahead of the work: the longer of the two counts. A CPU does both in turn."""
    slow, config = replace(IDEAL, layer_overhead=1e-3), RunConfig(precision="bf16", zero=0)
    launching = (
        5 * 4 * 3 * 1e-3
    )  # 5 micro-batches x 4 layers x a forward and a backward pass of twice the kernels
    gpu = step_time(config, model(4), layout(1, 1, 4), batch(5), slow)
    assert gpu.compute + gpu.overhead == pytest.approx(launching)
    large = model(4, flops=10**9)  # 64 tokens at 1 GFLOP: 64 ms
    assert step_time(config, large, layout(1, 1, 4), batch(5), slow).overhead == 0
    cpu = step_time(config, large, layout(1, 1, 4), batch(5), replace(slow, kind="cpu"))
    assert cpu.overhead == pytest.approx(launching)
    # ZeRO-3's hooks gather and let go of every module's parameters
    assert (
        step_time(RunConfig(precision="bf16", zero=3), model(4), layout(1, 1, 4), batch(5), slow).overhead
        > launching
    )


def test_ranks_on_one_cpu_share_its_cores() -> None:
    cpu = replace(IDEAL, kind="cpu")
    one = step_time(RunConfig(precision="bf16"), model(4), layout(1, 1, 4), batch(8), cpu)
    four = step_time(RunConfig(precision="bf16"), model(4), layout(1, 4, 4), batch(2, 4), cpu)
    assert four.compute == pytest.approx(one.compute)


def test_more_ranks_than_cores_leave_none_idle() -> None:
    """4 stages on 2 cores: both work all the time, or 2 + 3 micro-batches go one after the other, each on one core."""
    config = RunConfig(precision="bf16", pipeline=4)

    def found(micro_batches: int, cores: int) -> StepTime:
        cpu = replace(IDEAL, kind="cpu", gpus_per_node=cores)
        return step_time(config, model(4), layout(4, 1, 4), batch(micro_batches), cpu)

    assert found(4, 4).bubble_fraction == pytest.approx(3 / 7)
    assert found(4, 2).bubble == 0
    assert found(2, 2).total / found(2, 4).total == pytest.approx(1 / 2)


def gpt3() -> ModelShape:
    """GPT-3 with 175 billion parameters: 96 blocks of hidden size 12,288, a vocabulary of 51,200."""
    hidden, vocabulary = 12_288, 51_200
    return ModelShape(
        "gpt3", hidden, vocabulary, 2048,
        (
            Layer("embed", "embed", vocabulary * hidden, 0),
            *(
                Layer(f"block {i}", "block", 12 * hidden**2, 24 * hidden**2, {}, 4.0 * hidden)
                for i in range(96)
            ),
            Layer("head", "head", vocabulary * hidden, 2 * vocabulary * hidden),
        ),
        (Tied("wte", vocabulary * hidden, (0, 97)),), 96 * 12 * hidden**2 + vocabulary * hidden, None,
    )  # fmt: skip


def test_gpt3_takes_34_days_on_1024_a100() -> None:
    """300 billion tokens at 140 TFLOP/s a GPU, with recomputation: 8 T P / (n X) = 34 days.

    Narayanan et al. 2021, section 5.1. Its formula leaves attention's square out, which is a few percent.
    """
    tokens, gpus, rate = 300e9, 1024, 140e12
    a100 = replace(find_device("a100-80g", "test"), utilisation=rate / 312e12)
    seq_len, samples = 2048, 1536
    config = RunConfig(
        precision="bf16", pipeline=64, zero=1, activation_checkpointing=True, global_batch=samples, seq_len=seq_len,
        steps=round(tokens / (samples * seq_len)), attention="flash_attention_2",
    )  # fmt: skip
    shape = gpt3()
    cut = cut_by_cost([1, *[6] * 96, 4], 64)
    assert cut is not None
    hosts = tuple(Host(f"node-{number}", 8) for number in range(gpus // 8))
    found = step_time(config, shape, Layout(hosts, 64, 16, cut), Batch(samples, 1, 96, 16, seq_len), a100)
    days = 8 * tokens * shape.total_parameters / (gpus * rate) / 86400
    assert days == pytest.approx(34, abs=0.5)
    even = found.compute * config.steps / 86400
    # 98 layers do not fill 64 stages: the slowest has 2 blocks where the mean is 1.5.
    assert even == pytest.approx(days * 2 / 1.5, rel=0.06)


def test_mfu_is_palm_s() -> None:
    """6 N + 12 L H Q T FLOPs a token, over the peak: Chowdhery et al. 2022, appendix B."""
    seq_len = 2048
    shape, device = gpt3(), find_device("a100-80g", "test")
    made = Layout((Host("a", 8),), 1, 8, (0, 98))
    config = RunConfig(
        precision="bf16", seq_len=seq_len, activation_checkpointing=True, attention="flash_attention_2"
    )
    found = step_time(config, shape, made, Batch(64, 1, 8, 8, seq_len), device)
    per_token = 6 * shape.total_parameters + 12 * 96 * 12_288 * seq_len
    assert found.mfu == pytest.approx(found.tokens_per_second * per_token / (8 * 312e12), rel=0.01)


def test_run_and_tokens() -> None:
    config = RunConfig(precision="bf16", steps=70)
    found = step_time(config, model(4), layout(1, 2, 4), batch(3, 2), IDEAL)
    assert found.run_seconds == pytest.approx(70 * found.total)
    assert found.tokens_per_second == pytest.approx(3 * 2 * 2 * 32 / found.total)


# --- traffic, by hand: 4,000 parameters a stage, 4 replicas, 5 micro-batches of 2 samples of 32 tokens


@pytest.mark.parametrize(
    ("zero", "expected"),
    [
        (0, {"gradients": 2 * 3 / 4 * 4000 * 4}),
        (1, {"gradients": 2 * 3 / 4 * 4000 * 4, "weights": 3 / 4 * 4000 * 2}),
        (2, {"gradients": 5 * 2 * 3 / 4 * 4000 * 4, "weights": 3 / 4 * 4000 * 2}),
        # small enough to be kept from the forward to the backward pass
        (3, {"gradients": 5 * 3 / 4 * 4000 * 4, "weights": 5 * 3 / 4 * 4000 * 2}),
    ],
)
def test_ring_traffic(zero: int, expected: dict[str, float]) -> None:
    found = bytes_of(model(4), layout(1, 4, 4), batch(5, 4), zero=zero)
    assert found == {what: ("inside", size) for what, size in expected.items()}


def test_keys_of_deepspeed_s_that_change_the_traffic() -> None:
    config, shape, made, of = RunConfig(precision="bf16", zero=1), model(4), layout(1, 4, 4), batch(5, 4)

    def gradients(**keys: Any) -> int:
        return next(s.bytes for s in traffic(config, shape, made, of, keys) if s.what == "gradients")

    assert gradients() == gradients(communication_data_type="fp32") == 24_000
    assert gradients(communication_data_type="bf16") == 12_000
    assert gradients(zero_optimization={"use_multi_rank_bucket_allreduce": False}) == 12_000


def test_one_replica_sends_nothing() -> None:
    for zero in range(4):
        assert bytes_of(model(4), layout(1, 1, 4), batch(5), zero=zero) == {}


def test_zero_3_gathers_a_large_model_twice() -> None:
    """Of 2 billion parameters the last half billion is met again soon enough to be kept."""
    shape = model(4, parameters=500_000_000)
    found = bytes_of(shape, layout(1, 4, 4), batch(5, 4), zero=3)
    assert found["weights"][1] == 5 * 3 / 4 * 3.5e9 * 2
    # in front of other stages other micro-batches come in between
    shape = model(4, parameters=1000)
    for stage, gathers in ((0, 2), (1, 1)):
        found = bytes_of(shape, layout(2, 2, 4), batch(5, 2), stage, zero=3, pipeline=2)
        assert found["weights"][1] == 5 * gathers * 1 / 2 * 2000 * 2


def test_messages_of_stages() -> None:
    tokens, hidden = 2 * 32, 64
    out = back = 5 * tokens * hidden * 2
    found = [bytes_of(model(6), layout(3, 1, 6), batch(5), stage, pipeline=3) for stage in range(3)]
    assert found[0] == {"activations": ("inside", out)}
    assert found[1] == {"activations": ("inside", out), "activation gradients": ("inside", back)}
    assert found[2] == {"activation gradients": ("inside", back)}


def test_tied_weights_are_summed_over_their_stages() -> None:
    """Two stages: each sends it once, in fp32; with ZeRO only its own part."""
    shape = model(4, tied=800)
    assert bytes_of(shape, layout(2, 4, 4), batch(5, 4), zero=0, pipeline=2)["tied weights"][1] == 800 * 4
    assert bytes_of(shape, layout(2, 4, 4), batch(5, 4), zero=1, pipeline=2)["tied weights"][1] == 800
    assert "tied weights" not in bytes_of(shape, layout(1, 4, 4), batch(5, 4))
    folded = layout(2, 1, 4, schedule="dualpipev")  # both ends lie on the first rank
    assert "tied weights" not in bytes_of(shape, folded, batch(5), pipeline=2, schedule="dualpipev")


@pytest.mark.parametrize(
    ("pipeline", "slots", "gradients", "activations"),
    [
        (2, 8, "inside", "inside"),  # all on one host
        (2, 4, "between", "inside"),  # stages inside a host, replicas on two
        (2, 2, "between", "inside"),
        (8, 4, None, "between"),  # one pipeline over two hosts
        (4, 2, "between", "between"),
    ],
)
def test_which_link(pipeline: int, slots: int, gradients: str | None, activations: str) -> None:
    made = layout(pipeline, 8 // pipeline, 8, slots=slots)
    found = {
        s.what: s for s in traffic(RunConfig(pipeline=pipeline), model(8), made, batch(5, 8 // pipeline))
    }
    assert found["activations"].link == activations
    assert ("gradients" in found) == (gradients is not None)
    if gradients:
        assert found["gradients"].link == gradients


def test_ranks_of_a_host_carry_a_reduction_out_side_by_side() -> None:
    """8 replicas on 2 hosts: a host's 4 network cards share what leaves it. On 8 hosts each has its own only."""
    network = replace(IDEAL, between=Link(1e9, 0.0))
    config, shape = RunConfig(precision="bf16", zero=0), model(4)
    times = [
        step_time(config, shape, layout(1, 8, 4, slots=slots), batch(1, 8), network).data_parallel
        for slots in (4, 1)
    ]
    assert times[1] == pytest.approx(2 * 7 / 8 * 4000 * 4 / (0.8 * 1e9))
    assert times[0] == pytest.approx(times[1] / 4)


@pytest.mark.parametrize(
    ("zero", "precision", "copies"),
    [(1, "bf16", 1), (2, "bf16", 1), (3, "bf16", 9), (1, "fp32", 3), (2, "fp32", 10)],
)
def test_offloaded_gradients(zero: int, precision: str, copies: int) -> None:
    """ZeRO-3 and fp32 add micro-batches up in host memory, by way of the device."""
    found = bytes_of(model(4), layout(1, 4, 4), batch(5, 4), zero=zero, precision=precision, offload="cpu")
    assert found["offloaded gradients"] == ("host", copies * 1000 * 4)


def test_offload_goes_to_the_host_and_back() -> None:
    found = bytes_of(model(4), layout(1, 4, 4), batch(5, 4), zero=1, offload="cpu")
    assert found["offloaded gradients"] == ("host", 1000 * 4)
    assert found["offloaded weights"] == ("host", 1000 * 2)
    slow = replace(IDEAL, host_link=Link(1e6, 0.0), host_memory_bandwidth=1e30)
    config = RunConfig(precision="bf16", zero=1, offload="cpu")
    taken = step_time(config, model(4), layout(1, 4, 4), batch(5, 4), slow).optimizer
    assert taken == pytest.approx(6000 / (0.8 * 1e6))


def test_frozen_weights_are_not_reduced() -> None:
    shape = model(4)
    named = tuple(replace(layer, tensors={f"{layer.name}.w": 1000}) for layer in shape.layers)
    found = bytes_of(replace(shape, layers=named), layout(1, 2, 4), batch(5, 2), zero=1, freeze=["layer 1*"])
    assert found["gradients"][1] == 3000 * 4 and found["weights"][1] == 1 / 2 * 3000 * 2


# --- what must hold for all


@settings(deadline=None, max_examples=60)
@given(
    zero=st.integers(0, 3),
    pipeline=st.sampled_from([1, 2, 4]),
    replicas=st.sampled_from([1, 2, 8]),
    micro_batches=st.integers(1, 12),
    slots=st.sampled_from([2, 4, 8]),
    device=st.sampled_from(["h100-80g", "a10g-24g", "t4"]),
    better=st.sampled_from(["flops", "inside", "between", "memory_bandwidth", "layer_overhead"]),
)
def test_a_better_device_is_not_slower(
    zero: int, pipeline: int, replicas: int, micro_batches: int, slots: int, device: str, better: str
) -> None:
    world = pipeline * replicas
    made = layout(pipeline, replicas, 8, slots=slots if world % slots == 0 else world)
    config = RunConfig(precision="fp16", zero=zero, pipeline=pipeline)
    now = find_device(device, "test")
    faster = {
        "flops": {"flops": {precision: 2 * peak for precision, peak in now.flops.items()}},
        "inside": {"inside": Link(2 * now.inside.bandwidth, now.inside.latency / 2)},
        "between": {"between": Link(2 * now.between.bandwidth, now.between.latency / 2)},
        "memory_bandwidth": {"memory_bandwidth": 2 * now.memory_bandwidth},
        "layer_overhead": {"layer_overhead": now.layer_overhead / 2},
    }[better]
    shape = model(8, parameters=10**7, flops=2 * 10**7)
    before, after = (
        step_time(config, shape, made, batch(micro_batches, replicas), of)
        for of in (now, replace(now, **faster))
    )
    assert after.total <= before.total * (1 + 1e-9)
    for found in (before, after):
        assert found.total == pytest.approx(sum(getattr(found, part) for part in PARTS))
        assert 0 <= found.bubble_fraction < 1 and 0 < found.mfu < 1
        assert all(getattr(found, part) >= 0 for part in PARTS) and found.assumptions


PARTS = ("compute", "overhead", "bubble", "pipeline", "data_parallel", "optimizer")


@given(pipeline=st.integers(2, 8), micro_batches=st.integers(16, 64))
def test_more_micro_batches_shrink_the_bubble(pipeline: int, micro_batches: int) -> None:
    def fraction(number: int, schedule: str) -> float:
        config = RunConfig(precision="bf16", pipeline=pipeline, schedule=schedule)
        made = layout(pipeline, 1, 2 * pipeline, schedule=schedule)
        found: StepTime = step_time(config, model(2 * pipeline), made, batch(number), IDEAL)
        return found.bubble_fraction

    assert fraction(2 * micro_batches, "1f1b") < fraction(micro_batches, "1f1b")
    assert fraction(micro_batches, "dualpipev") < fraction(micro_batches, "1f1b")
