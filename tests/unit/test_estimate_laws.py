"""What holds for the estimates of every model, layout and device, however they are chosen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dstrain.config.loader import load_config, override
from dstrain.config.schema import RunConfig
from dstrain.estimate.device import Device, find_device, known_devices
from dstrain.estimate.memory import USABLE, StageMemory, memory_needed, stage_memory, state_bytes
from dstrain.estimate.memory_activations import hidden_bytes, layer_kept, layer_working, loss_rows
from dstrain.estimate.stage_time import attended_share
from dstrain.estimate.time import step_time
from dstrain.planning.batch import Batch
from dstrain.planning.buffer_sizes import TILE, bucket_size
from dstrain.planning.checks import refusal_of
from dstrain.planning.fitting.search import fit
from dstrain.planning.layout import Host, Layout
from dstrain.planning.make_plan import make_plan
from dstrain.planning.model_shape import ModelShape
from dstrain.planning.partition import cut_by_blocks, even_blocks
from dstrain.planning.plan import Machines
from dstrain.planning.schedules.messages import FEWEST_UNDER_WAY
from tests.support.plans import DATA, transformer

CLASSES = ("parameters", "gradients", "optimizer", "activations", "loss", "buffers")


@dataclass(frozen=True)
class Case:
    """A run to estimate."""

    config: RunConfig
    blocks: int
    hidden: int
    vocabulary: int
    tied: bool
    window: int
    layout: Layout
    batch: Batch
    accelerator: str
    bucket: int | None = None

    @property
    def shape(self) -> ModelShape:
        return transformer(self.blocks, self.hidden, self.vocabulary, tied=self.tied, window=self.window)

    @property
    def deepspeed(self) -> dict[str, Any] | None:
        return self.bucket and {"zero_optimization": {"reduce_bucket_size": self.bucket}}

    def memory(self) -> tuple[StageMemory, ...]:
        return stage_memory(
            self.config, self.shape, self.layout, self.batch, self.accelerator, self.deepspeed
        )

    def with_sizes(self, **sizes: int) -> Case:
        """The same with another micro-batch or sequence length, and as many micro-batches a step."""
        batch = replace(self.batch, **sizes)
        batch = replace(batch, global_batch=batch.micro_batch * batch.accumulation * batch.data_parallel)
        return replace(self, batch=batch, config=self.config.model_copy(update={"seq_len": batch.seq_len}))


@st.composite
def cases(draw: st.DrawFn, schedules: tuple[str, ...] = ("1f1b", "dualpipev")) -> Case:
    """From a model of a few thousand parameters on one device to hundreds of billions on a thousand."""
    precision = draw(st.sampled_from(["fp32", "bf16", "fp16"]))
    pipeline = draw(st.sampled_from([1, 1, 2, 3, 4, 8]))
    choices = {
        "zero": draw(st.integers(0, 3)),
        "pipeline": pipeline,
        "precision": precision,
        "schedule": draw(st.sampled_from(schedules)) if pipeline > 1 else "1f1b",
        "offload": draw(st.sampled_from(["none", "none", "cpu"])),
    }
    assume(refusal_of(**choices) is None)
    chunks = pipeline * (2 if choices["schedule"] == "dualpipev" else 1)
    blocks = draw(st.integers(chunks, chunks + 12))
    least = 2 * pipeline if choices["schedule"] == "dualpipev" else 1
    replicas = draw(st.sampled_from([1, 2, 3, 8, 64]))
    seq_len = draw(st.sampled_from([16, 128, 1000, 4096, 32_768]))
    micro_batch = draw(st.sampled_from([1, 1, 2, 5, 16]))
    # One micro-batch, as many as stages, or more: then gradients are there while activations gather.
    accumulation = draw(st.sampled_from([least, least, max(least, pipeline), least + pipeline, least + 16]))
    config = RunConfig(
        **choices,
        seq_len=seq_len,
        activation_checkpointing=draw(st.booleans()),
        pack=draw(st.booleans()),
        optimizer=draw(st.sampled_from(["adamw", "adamw", "sgd"])),
    )
    return Case(
        config=config,
        blocks=blocks,
        hidden=draw(st.sampled_from([48, 768, 2048, 4096, 8192])),
        vocabulary=draw(st.sampled_from([260, 32_000, 50_257, 128_256])),
        tied=draw(st.booleans()),
        window=draw(st.sampled_from([0, 0, 64])),
        layout=Layout(
            (Host("node", pipeline * replicas),),
            pipeline,
            replicas,
            cut_by_blocks(even_blocks(blocks, chunks)),
            choices["schedule"],
        ),
        batch=Batch(micro_batch * accumulation * replicas, micro_batch, accumulation, replicas, seq_len),
        accelerator=draw(st.sampled_from(["cuda", "cpu"])),
        bucket=draw(st.sampled_from([None, None, 100_000, 50_000_000])),
    )


@settings(max_examples=300, deadline=None)
@given(cases())
def test_the_total_holds_each_class_beside_what_is_always_there(case: Case) -> None:
    for need in case.memory():
        always = need.parameters + need.optimizer
        for name in ("gradients", "activations", "loss", "buffers"):
            assert need.total >= always + getattr(need, name), name


@settings(max_examples=300, deadline=None)
@given(cases())
def test_the_total_is_no_more_than_all_classes(case: Case) -> None:
    for need in case.memory():
        assert need.total <= sum(getattr(need, name) for name in CLASSES)


@settings(max_examples=300, deadline=None)
@given(cases(("1f1b",)))
def test_the_total_holds_what_is_alive_at_any_moment_of_a_step(case: Case) -> None:
    for stage, need in enumerate(case.memory()):
        for moment, alive in moments_of_step(case, stage):
            assert need.total >= need.parameters + need.optimizer + alive, moment


def moments_of_step(case: Case, stage: int) -> Iterator[tuple[str, int]]:
    """Activations and gradients that are alive on a stage of 1f1b, layer by layer as the passes come to them.

    Gradients of ZeRO-0 and 1 stay until the step's end. Those of ZeRO-2 and 3 are reduced bucket by bucket into this
    rank's share. Buckets, and whatever else DeepSpeed makes beside them, are left out.
    """
    config, shape, batch = case.config, case.shape, case.batch
    hidden = hidden_bytes(config, shape, batch.micro_batch)
    (chunk,) = case.layout.chunks(stage)
    layers = [shape.layers[index] for index in chunk if shape.layers[index].kind != "head"]
    kept = [layer_kept(config, layer, batch.micro_batch, hidden) for layer in layers]
    working = [layer_working(config, layer, batch.micro_batch) for layer in layers]
    sends = chunk.stop < len(shape.layers)
    trained = shape.parameters_of((chunk,))
    head = trained - sum(layer.parameters for layer in layers)
    if case.tied and case.layout.pipeline == 1:  # the head's comes first, and the embedding's is added to it
        head += shape.layers[0].parameters
    bucket = case.bucket or bucket_size(
        max(shape.parameters_of(case.layout.chunks(other)) for other in range(case.layout.pipeline))
    )
    shared = config.offload == "none" and -(-trained // batch.data_parallel) * 4

    def held(elements: int, passes: int) -> int:
        """Bytes of gradients that stay, when so many have come in this pass."""
        if config.zero <= 1:
            return 4 * (trained if passes else min(elements, trained))
        reduced = passes > 0 or (elements > bucket and trained > bucket)
        come = -(-elements // batch.data_parallel) * 4  # one micro-batch's are made one after the other
        return (
            (shared if batch.accumulation > 1 else min(shared, come)) if config.zero == 2 and reduced else 0
        )

    if config.offload != "none" and config.precision == "fp32":
        return  # DeepSpeed has them on the host
    flights = min(case.layout.pipeline - stage, batch.accumulation)
    begun = flights
    for done in range(batch.accumulation):
        begun = min(batch.accumulation, flights + done)
        output = min(FEWEST_UNDER_WAY, begun - done) * hidden * sends  # until they have arrived
        others = (begun - done - 1) * sum(kept)
        come = head
        for at in reversed(range(len(layers))):
            alive = others + output + sum(kept[: at + 1]) + working[at] + held(come, done)
            yield f"micro-batch {done}, layer {at}", alive
            come += layers[at].parameters
        yield f"micro-batch {done}, its end", others + output + held(come, done)
    if (
        config.zero == 1
    ):  # this rank's shares are made when the first bucket is full, which has taken its gradients
        yield "reduction", 4 * (trained - min(bucket, trained)) + 4 * min(bucket, trained) + shared


@settings(max_examples=150, deadline=None)
@given(cases(), st.sampled_from(["micro_batch", "seq_len"]), st.integers(1, 40))
def test_larger_micro_batches_and_longer_samples_need_no_less(case: Case, what: str, more: int) -> None:
    larger = case.with_sizes(**{what: getattr(case.batch, what) + more})
    for less, most in zip(case.memory(), larger.memory(), strict=True):
        assert most.total >= less.total


@settings(max_examples=150, deadline=None)
@given(cases(), st.integers(1, 3), st.integers(0, 15))
def test_a_stage_with_more_layers_needs_no_less(case: Case, more: int, at: int) -> None:
    """With the cut as it is, but for the layers that one chunk has more. Of more, ZeRO-3 may keep less gathered."""
    assume(case.config.zero < 3)
    cut = case.layout.cut
    chunk = at % (len(cut) - 1)
    longer = tuple(edge + more * (number > chunk) for number, edge in enumerate(cut))
    larger = replace(case, blocks=case.blocks + more, layout=replace(case.layout, cut=longer))
    for less, most in zip(case.memory(), larger.memory(), strict=True):
        assert most.total >= less.total


@settings(max_examples=150, deadline=None)
@given(cases(), st.integers(1, 100_000))
def test_a_larger_vocabulary_needs_no_less(case: Case, more: int) -> None:
    """But for a chunk of the loss, which has whole tiles of rows, and fewer of wider ones; ZeRO-3 is as above."""
    assume(case.config.zero < 3)
    larger = replace(case, vocabulary=case.vocabulary + more)
    size = case.batch.micro_batch
    fewer = loss_rows(case.config, case.shape, size) - loss_rows(case.config, larger.shape, size)
    head, hidden = larger.shape.layers[-1], hidden_bytes(case.config, larger.shape, size)
    of_head = layer_kept(case.config, head, size, hidden) + layer_working(case.config, head, size)
    tile = TILE * larger.vocabulary * (2 * 4 + 3 * 4)
    allowed = tile + fewer * of_head / (size * case.batch.seq_len)
    for less, most in zip(case.memory(), larger.memory(), strict=True):
        assert most.total >= less.total - allowed


@settings(max_examples=200, deadline=None)
@given(cases())
def test_a_higher_zero_stage_needs_no_more_for_its_states(case: Case) -> None:
    """But ZeRO-1 keeps a second copy of the weights in fp32, where ZeRO-0 has none: replicas share it."""
    choices = case.config.model_dump(include={"pipeline", "precision", "schedule", "offload"})
    replicas, lower = case.batch.data_parallel, None
    for zero in range(3, -1, -1):
        if refusal_of(zero=zero, **choices) is not None:
            continue
        config = case.config.model_copy(update={"zero": zero})
        states = state_bytes(config, replicas, device_is_host=case.accelerator == "cpu", gradient=4)
        if lower is not None:
            second = 4 / replicas if zero == 0 else 0.0
            assert lower.trained <= states.trained + second and lower.frozen <= states.frozen
        lower = states


DEVICES = [find_device(name, "here") for name in known_devices()]


def flops_of_busiest(case: Case) -> float:
    """What a step computes at least on its busiest stage, counted from the layers: forward and twice that back."""
    share = attended_share(case.config)
    forward = [layer.forward_flops(case.batch.seq_len, share) for layer in case.shape.layers]
    samples = case.batch.micro_batch * case.batch.accumulation
    stages = (case.layout.chunks(stage) for stage in range(case.layout.pipeline))
    return max(3 * samples * sum(forward[layer] for chunk in chunks for layer in chunk) for chunks in stages)


@settings(max_examples=200, deadline=None)
@given(cases(), st.sampled_from(DEVICES), st.sampled_from([1, 8]))
def test_a_step_takes_at_least_what_it_computes_at_the_peak(case: Case, device: Device, slots: int) -> None:
    assume(case.config.precision in device.flops)
    world = case.layout.world_size
    assume(world % slots == 0)
    hosts = tuple(Host(f"node-{number}", slots) for number in range(world // slots))
    layout = replace(case.layout, hosts=hosts)
    found = step_time(case.config, case.shape, layout, case.batch, device, deepspeed=case.deepspeed)
    peak = device.flops[case.config.precision] / (slots if device.kind == "cpu" else 1)
    # Not `compute` alone: a stage that computes less may take longer, by what it launches and sends.
    assert found.total >= flops_of_busiest(case) / peak
    parts = (found.overhead, found.bubble, found.pipeline, found.data_parallel, found.optimizer)
    assert all(part >= 0 for part in parts)
    assert abs(found.total - found.compute - sum(parts)) <= 1e-9 * found.total


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_fit_returns_nothing_that_plan_calls_too_large(data: st.DataObject) -> None:
    draw = data.draw
    device = draw(st.sampled_from(DEVICES))
    shape = transformer(
        draw(st.integers(1, 9)),
        draw(st.sampled_from([256, 1024, 4096])),
        draw(st.sampled_from([1000, 128_256])),
        tied=draw(st.booleans()),
    )
    # From a device that nothing fits on to one that holds all.
    memory = round(shape.total_parameters * draw(st.sampled_from([1, 3, 8, 16, 24, 60])))
    machines = Machines(
        tuple(Host(f"node-{number}", draw(st.sampled_from([1, 2, 4]))) for number in range(1)),
        device.kind,
        memory_bytes=memory,
        device=replace(device, memory_bytes=memory),
    )
    own = draw(st.sampled_from([None, 10_000_000, 500_000_000]))
    keys = (f"deepspeed.zero_optimization.reduce_bucket_size={own}",) if own else ()
    resolved = load_config(
        settings=("seq_len=256", *keys),
        flags={
            "global_batch": draw(st.sampled_from([4, 16])),
            "precision": draw(st.sampled_from([p for p in ("fp32", "bf16") if p in device.flops])),
            "partition": draw(st.sampled_from(["auto", "auto", "uniform", "parameters"])),
        },
    )
    found = fit(resolved, shape, machines, device)
    for row in found.best if found.fits else ():
        plan = make_plan(override(resolved, row.candidate.flags), machines, shape, DATA, "model.json")
        needed, _ = memory_needed(plan.layout, plan.stage_memory, plan.accelerator)
        assert needed <= USABLE * memory, row.candidate
        assert not plan.memory_verdict.startswith("does not fit"), row.candidate
