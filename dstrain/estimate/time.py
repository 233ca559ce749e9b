"""Estimates the time of an optimizer step: computation, waiting, communication, update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dstrain.config.schema import RunConfig
from dstrain.estimate.device import Device, Link
from dstrain.estimate.stage_time import attended_share, layer_times
from dstrain.estimate.traffic import Traffic, busiest, messages_along, stage_traffic, trained_parameters
from dstrain.optimizers import optimizer_facts, update_bytes
from dstrain.planning.batch import Batch
from dstrain.planning.buffer_sizes import loss_chunk
from dstrain.planning.layout import Layout
from dstrain.planning.model_shape import ModelShape

REACHED = 0.8
"""Fraction of a link's and of a memory's data sheet bandwidth that large transfers reach."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step; ``total`` is the sum of the first six.

    Attributes:
        compute: of the slowest stage, all its micro-batches, recomputation included.
        overhead: what does not shrink with the work: kernel launches, messages' latencies.
        bubble: idle while the pipeline fills and drains.
        pipeline: sending activations and their gradients, which nothing hides.
        data_parallel: reducing gradients and gathering parameters, as far as nothing hides it.
        optimizer: the update itself, offload's traffic included.
        bubble_fraction: of the time in the pipeline; (stages - 1) / (micro-batches + stages - 1) for even stages.
        tokens_per_second: of all devices together.
        run_seconds: of all steps of the run; validation losses and checkpoints are left out.
        mfu: model FLOPs utilisation, as Chowdhery et al. 2022 (PaLM), appendix B define it: forward and backward
            without recomputation, attention over the full square, over the peak of all devices.
        traffic: what the busiest rank sends.
        assumptions: what the numbers rest on, in words.
        utilisation: of the peak, with which matrix multiplications are counted.
        matrices: of ``compute`` and ``bubble``, what these take: the part that shrinks as the utilisation grows.
    """

    compute: float
    overhead: float
    bubble: float
    pipeline: float
    data_parallel: float
    optimizer: float
    total: float
    bubble_fraction: float
    tokens_per_second: float
    run_seconds: float
    mfu: float
    traffic: tuple[Traffic, ...]
    assumptions: tuple[str, ...]
    utilisation: float = 0.0
    matrices: float = 0.0


@dataclass(frozen=True)
class _Stage:
    """Seconds of one stage: for a micro-batch, and at the end of a step. ``matrices`` is a part of ``compute``."""

    matrices: float
    compute: float
    launching: float
    sending: float
    waiting: float
    reducing: float
    latency: float
    updating: float

    @property
    def micro_batch(self) -> float:
        return self.compute + self.launching + self.sending + self.waiting


def step_time(
    config: RunConfig,
    shape: ModelShape,
    layout: Layout,
    batch: Batch,
    device: Device,
    *,
    deepspeed: Mapping[str, Any] | None = None,
) -> StepTime:
    """The time of one step of this layout on these devices.

    A pipeline takes as long as its slowest stage needs for all micro-batches, and while it fills and drains the other
    stages' time for one. With even stages that is (m + p - 1) / m of the ideal.

    Args:
        deepspeed: the composed DeepSpeed JSON; None: as ``ds_configs/`` has it.

    Source: Huang et al. 2019, GPipe, section 2; Narayanan et al. 2021, Efficient Large-Scale Language Model Training
    on GPU Clusters Using Megatron-LM, section 2.2; DualPipeV: the table in the README of deepseek-ai/DualPipe.
    """
    peak, sharing = _peak(config, layout, device)
    times = _layer_flops(config, shape, batch)
    sent = [stage_traffic(config, shape, layout, batch, s, deepspeed) for s in range(layout.pipeline)]
    stages = [
        _stage(config, shape, layout, batch, device, s, times, peak * device.utilisation, sharing, sent[s])
        for s in range(layout.pipeline)
    ]
    m = batch.accumulation
    slowest = max(stages, key=lambda stage: stage.micro_batch)
    backward = backward_passes(config)
    waiting = stages_waiting(layout.pipeline, layout.schedule, backward) / max(1, layout.pipeline - 1)
    filling = waiting * (sum(stage.micro_batch for stage in stages) - slowest.micro_batch)
    busy = m * slowest.micro_batch
    if device.kind == "cpu" and sharing > device.gpus_per_node:
        # More ranks than cores: what a rank does not use while it waits, the others do. Then all cores are busy, or
        # the chain of stages takes longer, each on a core of its own.
        filling = max(0.0, (busy + filling) * device.gpus_per_node / sharing - busy)
    last = max(stages, key=lambda stage: stage.reducing + stage.latency + stage.updating)

    compute, pipeline = m * slowest.compute, m * slowest.sending
    overhead = m * (slowest.launching + slowest.waiting) + last.latency
    total = compute + overhead + filling + pipeline + last.reducing + last.updating
    others = sum(stage.micro_batch for stage in stages) - slowest.micro_batch
    shrinking = (sum(stage.matrices for stage in stages) - slowest.matrices) / others if others else 0.0
    model_flops = batch.global_batch * 3 * sum(layer.forward_flops(batch.seq_len) for layer in shape.layers)
    return StepTime(
        compute=compute,
        overhead=overhead,
        bubble=filling,
        pipeline=pipeline,
        data_parallel=last.reducing,
        optimizer=last.updating,
        total=total,
        bubble_fraction=filling / (busy + filling),
        tokens_per_second=batch.tokens / total,
        run_seconds=config.steps * total,
        mfu=model_flops / (total * peak * layout.world_size),
        traffic=busiest(sent),
        assumptions=_assumptions(config, layout, device),
        utilisation=device.utilisation,
        matrices=m * slowest.matrices + filling * shrinking,
    )


def backward_passes(config: RunConfig) -> float:
    """The time of a backward pass, in forward passes: what is recomputed runs once more."""
    return 3.0 if config.activation_checkpointing else 2.0


def stages_waiting(pipeline: int, schedule: str, backward: float = 2.0) -> float:
    """For how many micro-batches' time a stage is idle while the pipeline fills and drains, with even stages.

    1f1b: pipeline - 1. zb-h1: what the gradients of the weights, a forward pass's time, do not fill of it. dualpipev,
    whose ranks hold two chunks: each step of filling takes half a forward and a backward pass, since DeepSpeed keeps
    the weights' gradients inside the backward pass. With them put off, as DeepSeek does it, it would be a third of
    1f1b's; here it is 5/6, less half a forward pass.

    Args:
        backward: the time of a backward pass over that of a forward pass; 3 where blocks are recomputed.

    Source: Qi et al. 2023 (arXiv 2401.10241), section 2.1; the table in the README of deepseek-ai/DualPipe,
    (PP/2 - 1)(F&B + B - 3W) with PP/2 ranks and W = 0; these agree with a simulation of DeepSpeed's own instructions
    (tests/distributed/test_traffic.py), and of the tables (tests/unit/test_schedules.py).
    """
    if schedule == "zb-h1":
        return (pipeline - 1) * (backward - 1) / (1 + backward)
    if schedule != "dualpipev" or pipeline == 1:
        return pipeline - 1.0
    return ((pipeline - 1) * (0.5 + backward) - 0.5) / (1 + backward)


def _peak(config: RunConfig, layout: Layout, device: Device) -> tuple[float, int]:
    """Peak FLOP/s of one rank, and how many ranks share one device: those of one machine's CPU."""
    sharing = max(host.slots for host in layout.hosts) if device.kind == "cpu" else 1
    return device.flops[config.precision] / sharing, sharing


def _layer_flops(config: RunConfig, shape: ModelShape, batch: Batch) -> tuple[int, ...]:
    chunk = loss_chunk(batch.micro_batch, batch.seq_len, shape.vocab_size, tokenwise=shape.tokenwise_head)
    return layer_times(
        shape,
        seq_len=batch.seq_len,
        attended=attended_share(config),
        blocks_recomputed=config.activation_checkpointing,
        head_recomputed=chunk > 0,
    )


# Python's work for a layer and a micro-batch, in forward passes' launches (`Device.layer_overhead`): forward and
# backward; the same once more, and the hooks that see to it; ZeRO's hooks by stage, which with ZeRO-3 gather and let go
# of the parameters of every module. And a pipeline's instructions for each chunk. Measured with DeepSpeed 0.19.8 on a
# CPU: processor seconds of a rank with 1 and with 8 micro-batches, a model of 8 small layers.
_PASSES = 3
_RECOMPUTED = 3
_HOOKS = {0: 0.0, 1: 0.3, 2: 1.2, 3: 11.0}
_INSTRUCTIONS = 10


def _stage(
    config: RunConfig,
    shape: ModelShape,
    layout: Layout,
    batch: Batch,
    device: Device,
    stage: int,
    times: Sequence[float],
    rate: float,
    sharing: int,
    sent: Sequence[Traffic],
) -> _Stage:
    layers = [layer for chunk in layout.chunks(stage) for layer in chunk]
    m = batch.accumulation
    compute = matrices = batch.micro_batch * sum(times[layer] for layer in layers) / rate
    if len(shape.layers) - 1 in layers:
        compute += _loss(shape, batch, device, sharing)
    each = _PASSES + _RECOMPUTED * config.activation_checkpointing + _HOOKS[config.zero]
    instructions = _INSTRUCTIONS * len(layout.chunks(stage)) if layout.pipeline > 1 else 0
    launching = device.layer_overhead * (each * len(layers) + instructions)
    if device.kind == "cuda":  # launched ahead of the work: only what the work does not hide is lost
        launching = max(0.0, launching - compute)

    sending = waiting = 0.0
    received = _received(layout, stage, sent)
    for part in (*sent, *received):
        if part.what in ("activations", "activation gradients"):
            sending += _seconds(part, device, sharing) / m
            waiting += _latency(part, device) / m

    reducing = latency = 0.0
    for part in sent:
        if part.what in ("gradients", "weights", "tied weights"):
            reducing += _seconds(part, device, sharing)
            latency += _latency(part, device)
    if config.zero == 3 and device.kind == "cuda" and layout.pipeline == 1:
        # Gathered ahead and reduced behind; the first gathering of each pass has nothing to hide behind.
        exposed = max(reducing - m * (compute + launching), reducing / len(shape.layers))
        reducing, latency = min(reducing, exposed), 0.0
    updating = _update(config, shape, layout, batch, device, stage, sharing)
    updating += sum(_seconds(part, device, sharing) for part in sent if part.link == "host")
    return _Stage(matrices, compute, launching, sending, waiting, reducing, latency, updating)


def _received(layout: Layout, stage: int, sent: Sequence[Traffic]) -> list[Traffic]:
    """What a stage receives takes its time as well: messages wait for both ends. LocalRanks send what it sends."""
    if layout.schedule == "dualpipev":  # sent and received at once
        return []
    out, back = messages_along(layout, stage)
    return [
        part
        for part in sent
        if (part.what == "activations" and back) or (part.what == "activation gradients" and out)
    ]


def _seconds(part: Traffic, device: Device, sharing: int) -> float:
    """How long its bytes take. What several ranks of a host carry out of it goes side by side."""
    link = _link(part, device)
    bandwidth = link.bandwidth
    if part.link == "between":
        bandwidth = min(part.lanes * bandwidth, device.inside.bandwidth)
    if device.kind == "cpu" and part.link == "inside":
        bandwidth /= sharing
    return part.bytes / (REACHED * bandwidth)


def _latency(part: Traffic, device: Device) -> float:
    return part.messages * _link(part, device).latency


def _link(part: Traffic, device: Device) -> Link:
    return {"inside": device.inside, "between": device.between, "host": device.host_link}[part.link]


# Bytes that are moved for one parameter beside the update itself, which `dstrain.optimizers` has: the norm,
# clipping, and the weights written in their own precision.
# On CPUs a large tensor is new memory each time, whose pages the kernel has to clear first: what is said for them was
# measured with DeepSpeed 0.19.8, in processor seconds of a rank with 2, 10 and 23 million parameters.
_BESIDE = {"cuda": 20, "cpu": 40}
# ZeRO copies each gradient into a bucket, whoever it belongs to: once a step, or with ZeRO-2 and 3 behind each
# micro-batch.
_HANDLED = {"cuda": 8, "cpu": 48}
# Bytes that the loss moves for one logit: to fp32 and back, the softmax and its gradient. They count no FLOPs.
_LOSS = {"cuda": 40, "cpu": 80}


def _loss(shape: ModelShape, batch: Batch, device: Device, sharing: int) -> float:
    """Seconds of one micro-batch's loss, which memory bandwidth limits."""
    logits = batch.micro_batch * batch.seq_len * shape.vocab_size
    return logits * _LOSS[device.kind] * sharing / (REACHED * device.memory_bandwidth)


def _update(
    config: RunConfig,
    shape: ModelShape,
    layout: Layout,
    batch: Batch,
    device: Device,
    stage: int,
    sharing: int,
) -> float:
    """Seconds of the optimizer's update of this rank's share, which memory bandwidth limits."""
    trained = trained_parameters(config, shape, layout, stage)
    share = trained / (layout.data_parallel if config.zero else 1)
    facts = optimizer_facts(config.optimizer)
    moved = update_bytes(facts, vars(config))
    if device.kind == "cuda" and config.offload == "none" and facts.fused_update_bytes is not None:
        moved = facts.fused_update_bytes
    bandwidth = REACHED * device.memory_bandwidth / sharing
    times = {0: 0, 1: 1}.get(config.zero, batch.accumulation)
    handled = _HANDLED[device.kind] * times * trained / bandwidth
    if config.offload == "none" or device.kind == "cpu":
        return handled + share * (moved + _BESIDE[device.kind]) / bandwidth
    on_host = max(host.slots for host in layout.hosts)
    if facts.offloaded_update_bytes is not None:
        moved = facts.offloaded_update_bytes
    seconds = handled + share * moved * on_host / (REACHED * device.host_memory_bandwidth)
    if config.offload == "nvme":  # weights and moments, read and written
        seconds += share * 24 * on_host / (REACHED * device.disk_bandwidth)
    return seconds


def _assumptions(config: RunConfig, layout: Layout, device: Device) -> tuple[str, ...]:
    """What the numbers of a `StepTime` rest on, the weightiest first."""
    peak = device.flops[config.precision] / 1e12
    found = [
        f"layers compute at {device.utilisation:.0%} of {device.name}'s {peak:,.4g} TFLOP/s in {config.precision}"
        f" ({device.source}{f'; utilisation {device.measured}' if device.measured else ''})",
        f"links and memory reach {REACHED:.0%} of their nominal bandwidth, and nothing else uses them",
    ]
    if device.kind == "cpu":
        found.append("the ranks of a host share its cores, its memory and the loopback device evenly")
        most = max(host.slots for host in layout.hosts)
        if layout.pipeline > 1 and most > device.gpus_per_node:
            found.append(f"{most} ranks share {device.gpus_per_node} cores: while one waits, others compute")
    else:
        found.append(
            f"a layer launches its kernels in {device.layer_overhead * 1e6:.0f} us, ahead of the work"
        )
    if layout.data_parallel > 1:
        if config.zero == 3 and layout.pipeline == 1 and device.kind == "cuda":
            found.append("ZeRO-3 gathers and reduces while computing, except for the first layer of a pass")
        else:
            found.append("communication between replicas does not overlap with computation")
    if layout.pipeline > 1:
        if layout.schedule == "dualpipev":
            found.append("a stage does not compute while it sends to or receives from adjacent stages")
            found.append("with dualpipev, a simultaneous send and receive takes the time of one")
        else:
            found.append("messages between stages are counted as if no computing hid them")
    if len(layout.hosts) > 1:
        found.append(
            f"each device has {device.between.bandwidth / 1e9:,.3g} GB/s of network bandwidth between hosts to itself"
        )
        if layout.data_parallel > 1 and layout.hosts[0].slots > 1:
            found.append("traffic of replicas between hosts uses the network cards of all ranks in parallel")
    if config.offload != "none" and device.kind == "cuda":
        found.append(
            f"the ranks of a host share its memory's {device.host_memory_bandwidth / 1e9:,.0f} GB/s for the"
            " offloaded update"
        )
    if config.offload == "nvme":
        found.append(f"they share a disk of {device.disk_bandwidth / 1e9:,.3g} GB/s")
    found.append("validation, checkpoints, and waiting for data or for slower machines are not included")
    return tuple(found)
