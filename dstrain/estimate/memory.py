"""Estimates a rank's device memory by class, for a partition or layer by layer.

Left out: the accelerator's own context, the communication library's buffers and fragmentation, for which
`USABLE` leaves room. Compared with every tensor of real ranks in tests/distributed/test_memory.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

from dstrain.config.schema import RunConfig
from dstrain.estimate.memory_activations import (
    StageActivations,
    hidden_bytes,
    layer_kept,
    layer_working,
    loss_bytes,
    masks_held,
    micro_batches_in_flight,
    spans_in_flight,
    stage_activations,
)
from dstrain.estimate.memory_backward import Pass, arriving, beside_activations, growing
from dstrain.estimate.memory_peaks import Moments
from dstrain.estimate.memory_states import StateBytes, state_bytes, states
from dstrain.estimate.stage_parameters import (
    GatheredWeights,
    Stage,
    quantized_parameters,
    stage_parameters,
    weight_bytes,
)
from dstrain.estimate.zero3_gathering import Gathering, gathering
from dstrain.planning.batch import Batch
from dstrain.planning.buffer_sizes import LARGEST_BUCKET, bucket_size
from dstrain.planning.layout import Layout
from dstrain.planning.model_shape import Layer, ModelShape, frozen_names

__all__ = [
    "USABLE",
    "Memory",
    "StageMemory",
    "StateBytes",
    "estimate",
    "memory_needed",
    "memory_verdict",
    "micro_batches_in_flight",
    "stage_memory",
    "state_bytes",
]

USABLE = 0.92
"""Fraction of a device's memory that the estimate may fill."""

TIGHT = 0.9
"""Above this fraction of what may be filled it is tight: the estimate is not exact, and memory gets fragmented."""


@dataclass(frozen=True)
class StageMemory:
    """Bytes on a rank of one stage, each class at its own fullest moment of a step.

    Attributes:
        parameters: weights in the precision that is computed with; with ZeRO-3 the rank's shard.
        gradients: what holds gradients between micro-batches, fp32 accumulators included, and what is reduced of them.
        optimizer: fp32 masters and moments on the device.
        activations: kept for the backward pass, of all micro-batches in flight, what the passes of one block take
            beside them, its recomputation included, and masks.
        loss: logits, softmax and their gradients.
        buffers: buckets of reductions, the pipeline's buffers, gathered parameters, temporaries of the step.
        host: bytes of host memory that offloading takes; not part of ``total``.
        together: of all classes at their common fullest moment. Less than their sum, as the activations are gone when
            the optimizer works; 0: not known.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    buffers: int
    host: int
    together: int = 0

    @property
    def total(self) -> int:
        """The most that is needed at a time."""
        return self.together or (
            self.parameters + self.gradients + self.optimizer + self.activations + self.loss + self.buffers
        )


def stage_memory(
    config: RunConfig,
    shape: ModelShape,
    layout: Layout,
    batch: Batch,
    accelerator: str,
    deepspeed: Mapping[str, Any] | None = None,
) -> tuple[StageMemory, ...]:
    """What a rank of each stage needs, for a given cut.

    Args:
        accelerator: ``cuda`` or ``cpu``, where what is offloaded stays in the same memory.
        deepspeed: the composed JSON, whose buckets may be the user's own; None: those that a plan derives.
    """
    options = (deepspeed or {}).get("zero_optimization", {})
    largest = max(shape.parameters_of(layout.chunks(stage)) for stage in range(layout.pipeline))
    bucket = int(options.get("reduce_bucket_size", bucket_size(largest)))
    found = []
    for stage in range(layout.pipeline):
        parameters = stage_parameters(
            shape,
            layout.chunks(stage),
            config.freeze,
            bucket=bucket,
            replicas=layout.data_parallel,
            alone=layout.pipeline == 1,
        )
        passes = stage_activations(config, shape, layout, batch, stage)
        if config.zero == 3 and parameters.replicas > 1:
            ahead = gathering(config, shape, layout, batch, stage, options)
            parameters = _with_gathered(parameters, ahead, passes.passes[0], weight_bytes(config))
        # In a step's first backward pass gradients come, in the later ones they are there. With dualpipev one chunk's
        # are there while the other's activations gather.
        folded = layout.schedule == "dualpipev" and layout.pipeline > 1
        several = batch.accumulation > 1
        held, then = (
            states(config, parameters, accelerator, options, several=several, later=later)
            for later in (folded, several)
        )
        full = folded or batch.accumulation > max(spans_in_flight(layout, stage, batch.accumulation))
        moments = then.moments
        in_midst = passes.at_bucket(bucket) if config.zero >= 2 else passes.waiting
        always = held.parameters + held.optimizer + passes.pipeline + passes.masks
        together = always + max(
            _of_pass(held.moments, parameters, passes, passes.kept),
            _of_pass(moments, parameters, passes, passes.kept if full else passes.waiting) if several else 0,
            0 if folded else _of_first_pass(config, held.moments, passes),
            # ZeRO-2 and 3 reduce behind each micro-batch, while others are in flight, and whenever a bucket is full.
            moments.reduced + (passes.waiting if config.zero >= 2 else 0),
            _at_bucket(config, moments, parameters, passes, in_midst) if in_midst > passes.waiting else 0,
            _at_the_end(moments, passes) if config.zero == 2 and not several else 0,
            moments.step.total,
            moments.forward.total + passes.received,
        )
        reductions = (
            (*moments.reduction, moments.bucket, moments.head)
            if in_midst > passes.waiting
            else moments.reduction
        )
        found.append(
            StageMemory(
                parameters=held.parameters,
                gradients=moments.gradients,
                optimizer=held.optimizer,
                activations=passes.fullest + passes.masks,
                loss=passes.loss,
                buffers=passes.pipeline
                + max(
                    moments.loss.buffers + passes.summed + passes.received,
                    moments.backward.buffers + passes.received,
                    moments.forward.buffers + passes.received,
                    *(moment.buffers for moment in reductions),
                    moments.step.buffers,
                ),
                host=held.host,
                together=together,
            )
        )
    return tuple(found)


def _with_gathered(stage: Stage, found: Gathering, layers: Pass, weight: int) -> Stage:
    """With what ZeRO-3 gathers; ``weight``: bytes of an element."""
    gathered = GatheredWeights(
        most=found.most,
        at_head=found.live[0],
        at_end=found.live[-1],
        in_blocks=beside_activations(layers, found.live, weight),
        at_bucket=beside_activations(layers, found.live, weight, bucket=stage.bucket),
    )
    return replace(stage, gathered=gathered)


def _of_pass(moments: Moments, parameters: Stage, passes: StageActivations, kept: int) -> int:
    """A backward pass that begins with so many bytes of activations in flight."""
    within = moments.backward.total + kept + max(passes.working, passes.head)
    if moments.arriving:
        beside = moments.backward.total - moments.arriving * parameters.tensor + kept
        within = beside + max(arriving(layers, moments.arriving) for layers in passes.passes)
    at_the_loss = moments.loss.total + kept + passes.head + max(passes.loss, passes.summed)
    return passes.received + max(at_the_loss, within)


def _of_first_pass(config: RunConfig, moments: Moments, passes: StageActivations) -> int:
    """A step's first backward pass, whose gradients come while its activations go: without shards of them."""
    if config.zero > 1:
        return 0
    weight = weight_bytes(config)
    before = moments.backward.total - moments.passing
    return (
        before
        + passes.received
        + passes.waiting
        + passes.outputs
        + max(growing(layers, 4, weight) for layers in passes.passes)
    )


def _at_the_end(moments: Moments, passes: StageActivations) -> int:
    """The end of the only backward pass: its last block is there, and all gradients but that one's."""
    ends = [layers[-2:] for layers in passes.passes]  # a block, and in the first chunk the embedding
    last = (layer.working + sum(each.kept for each in end) for end in ends for layer in end)
    return moments.reduced + passes.waiting + max(last, default=0)


def _at_bucket(
    config: RunConfig, moments: Moments, parameters: Stage, passes: StageActivations, there: int
) -> int:
    """A bucket is full in the midst of a backward pass, with so many bytes of activations; then the pass goes on.

    A block that was computed again is there, but for what its first gradients have let go.
    """
    arriving_now = weight_bytes(config) * (parameters.in_blocks + parameters.both_ends)
    buffers = moments.backward.buffers - moments.passing + arriving_now
    going_on = moments.bucket.gradients + buffers + passes.working
    recomputed = 3 * passes.working // 4 if config.activation_checkpointing else 0
    return there + max(moments.bucket.total + recomputed, moments.head.total, going_on)


@dataclass(frozen=True)
class Memory:
    """Bytes on a rank, layer by layer.

    Attributes:
        states: of each layer's parameters, gradients and optimizer.
        once: what a layer needs for one micro-batch at a time: the head's logits.
        kept: what a layer keeps of each micro-batch in flight, for the backward pass.
        boundary: what a stage keeps of each micro-batch in flight at its ends.
        working: what any stage needs beside: one block's recomputation, masks, gathered parameters, buckets.
        in_flight: micro-batches in flight on each stage.
    """

    states: tuple[int, ...]
    once: tuple[int, ...]
    kept: tuple[int, ...]
    boundary: int
    working: int
    in_flight: tuple[float, ...]

    def of_stage(self, stage: int, chunks: Sequence[range]) -> int:
        """Bytes that a rank of this stage needs for these layers."""
        fixed = self.working + sum(
            self.states[layer] + self.once[layer] for chunk in chunks for layer in chunk
        )
        kept = sum(self.boundary + sum(self.kept[layer] for layer in chunk) for chunk in chunks)
        return round(fixed + self.in_flight[stage] * kept)


def estimate(
    config: RunConfig,
    shape: ModelShape,
    *,
    replicas: int,
    micro_batch: int,
    accumulation: int,
    device_is_host: bool = False,
) -> Memory:
    """What each layer and stage need on a rank of this run, in a form that adds up over layers.

    It is for the search of the cut: `stage_memory` at the moment when the last micro-batch's backward pass begins,
    with buffers as of a stage of middle size. A tied weight counts with its first owner only where one rank holds all
    of its owners.
    """
    per_parameter = state_bytes(config, replicas, device_is_host=device_is_host, gradient=4)
    weight = weight_bytes(config)
    hidden = hidden_bytes(config, shape, micro_batch)

    frozen = frozen_names(shape, config.freeze)
    sizes = [_states(layer, per_parameter, frozen) for layer in shape.layers]
    if config.pipeline == 1 or config.schedule == "dualpipev":
        for tied in shape.tied:
            ends = {0, len(shape.layers) - 1}
            if config.pipeline == 1 or ends.issuperset(tied.layers):
                own = per_parameter.frozen if frozen.intersection(tied.names) else per_parameter.trained
                for layer in tied.layers[1:]:
                    sizes[layer] -= round(tied.parameters * own)

    mean = shape.total_parameters // config.pipeline
    bucket = min(mean, LARGEST_BUCKET) * (4 if config.zero in (1, 3) else weight) if config.zero else 0
    gathered = weight * mean if config.zero == 3 and replicas > 1 else 0
    loss = loss_bytes(config, shape, micro_batch)
    return Memory(
        states=tuple(sizes),
        once=tuple(loss if layer.kind == "head" else 0 for layer in shape.layers),
        kept=tuple(layer_kept(config, layer, micro_batch, hidden) for layer in shape.layers),
        boundary=2 * hidden if config.pipeline > 1 else 0,
        working=gathered
        + bucket
        + masks_held(config, shape.layers, micro_batch)
        + max(layer_working(config, layer, micro_batch) for layer in shape.layers),
        in_flight=micro_batches_in_flight(config.pipeline, config.schedule, accumulation),
    )


def _states(layer: Layer, per_parameter: StateBytes, frozen: Set[str]) -> int:
    still = sum(number for name, number in layer.tensors.items() if name in frozen)
    quantized = sum(layer.quantized.values()) - quantized_parameters(layer) * per_parameter.frozen
    return round(
        (layer.parameters - still) * per_parameter.trained + still * per_parameter.frozen + quantized
    )


def memory_needed(layout: Layout, needs: Sequence[StageMemory], accelerator: str) -> tuple[int, int]:
    """Bytes needed of one device's memory, and the stage that needs most; on CPUs of a host's, by all its ranks."""
    fullest = max(range(len(needs)), key=lambda stage: needs[stage].total)
    if accelerator != "cpu":
        return needs[fullest].total, fullest
    sums = [0] * len(layout.hosts)
    for rank in range(layout.world_size):
        sums[layout.host(rank)] += needs[layout.stage(rank)].total
    return max(sums), fullest


def memory_verdict(
    layout: Layout, needs: Sequence[StageMemory], memory_bytes: int | None, accelerator: str
) -> str:
    """``fits``, ``tight`` or ``does not fit``, and by how much; empty where the memory is not known."""
    if memory_bytes is None:
        return ""
    needed, fullest = memory_needed(layout, needs, accelerator)
    usable = USABLE * memory_bytes
    who = f"a rank of stage {fullest} needs" if layout.pipeline > 1 else "a rank needs"
    if accelerator == "cpu" and layout.world_size > 1:
        who = "the ranks of a host need"
    sum_ = f"{who} about {_gb(needed)} of the {_gb(usable)} that can be filled of {_gb(memory_bytes)}"
    if needed > usable:
        return f"does not fit: {sum_}, {_gb(needed - usable)} too much"
    left = f"{sum_}, {_gb(usable - needed)} to spare"
    return f"tight: {left}" if needed > TIGHT * usable else f"fits: {left}"


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
