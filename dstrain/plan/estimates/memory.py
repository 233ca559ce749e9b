"""What a stage needs of its device's memory: an estimate, to keep the cut from asking for more than there is.

Left out: the accelerator's own context, the communication library's buffers and fragmentation, for which
`USABLE` leaves room.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

from dstrain.config.schema import RunConfig
from dstrain.plan.loss_chunk import loss_chunk
from dstrain.plan.refusals import frozen_names
from dstrain.plan.shape import Layer, ModelShape

USABLE = 0.92
"""Fraction of a device's memory that the estimate may fill."""


@dataclass(frozen=True)
class StateBytes:
    """Bytes of one parameter's states on one rank, and of a frozen one's."""

    trained: float
    frozen: float


@dataclass(frozen=True)
class Memory:
    """Bytes on a rank, layer by layer.

    Attributes:
        states: of each layer's parameters, gradients and optimizer.
        once: what a layer needs for one micro-batch at a time: the head's logits.
        kept: what a layer keeps of each micro-batch in flight, for the backward pass.
        boundary: what a stage keeps of each micro-batch in flight at its ends.
        working: what any stage needs beside: one block's recomputation, gathered parameters, buckets.
        in_flight: micro-batches in flight on each stage.
    """

    states: tuple[int, ...]
    once: tuple[int, ...]
    kept: tuple[int, ...]
    boundary: int
    working: int
    in_flight: tuple[float, ...]

    def of_stage(self, stage: int, spans: Sequence[range]) -> int:
        """Bytes that a rank of this stage needs for these layers."""
        fixed = self.working + sum(self.states[layer] + self.once[layer] for span in spans for layer in span)
        kept = sum(self.boundary + sum(self.kept[layer] for layer in span) for span in spans)
        return round(fixed + self.in_flight[stage] * kept)


def state_bytes(config: RunConfig, replicas: int, *, device_is_host: bool = False) -> StateBytes:
    """Parameters, gradients and optimizer states of one parameter on one rank.

    In 16 bits with AdamW: 2 + 2 + 12, of which ZeRO-1 shares out the 12 among the replicas, ZeRO-2 the gradients'
    2 too, ZeRO-3 all. In fp32 DeepSpeed's ZeRO keeps a second fp32 copy of the weights as well.

    Args:
        device_is_host: on CPUs offloaded states stay in the same memory.

    Source: Rajbhandari et al. 2020, ZeRO: Memory Optimizations Toward Training Trillion Parameter Models, figure 1.
    """
    weight = 4 if config.precision == "fp32" else 2
    moments = 8 if config.optimizer == "adamw" else 4 * (config.momentum > 0)
    offloaded = config.offload != "none" and not device_is_host
    parameters = weight / (replicas if config.zero == 3 else 1)
    gradients = weight / (replicas if config.zero >= 2 else 1)
    optimizer = (moments + 4 * (config.zero > 0)) / (replicas if config.zero >= 1 else 1)
    if offloaded:
        optimizer = 0.0
        gradients = 0.0 if config.zero >= 2 else gradients
    return StateBytes(parameters + gradients + optimizer, parameters)


def micro_batches_in_flight(pipeline: int, schedule: str, accumulation: int) -> tuple[float, ...]:
    """How many micro-batches each stage keeps activations of, for each of its spans.

    1f1b: stage i has started pipeline - i of them before it ends the first one. dualpipev: 2 x pipeline + 1 spans'
    worth on every rank, which holds two.

    Source: Narayanan et al. 2021, section 2.2; DeepSeek's DualPipe, table of its README.
    """
    if schedule == "dualpipev" and pipeline > 1:
        return tuple(min(pipeline + 0.5, accumulation) for _ in range(pipeline))
    return tuple(float(min(pipeline - stage, accumulation)) for stage in range(pipeline))


def estimate(
    config: RunConfig,
    shape: ModelShape,
    *,
    replicas: int,
    micro_batch: int,
    accumulation: int,
    device_is_host: bool = False,
) -> Memory:
    """What each layer and stage need on a rank of this run.

    A tied weight counts with its first owner only where one rank holds all of its owners.
    """
    per_parameter = state_bytes(config, replicas, device_is_host=device_is_host)
    weight = 4 if config.precision == "fp32" else 2
    saved = [micro_batch * layer.saved_bytes(config.seq_len, config.precision) for layer in shape.layers]
    hidden = micro_batch * config.seq_len * shape.hidden_size * weight
    if config.activation_checkpointing:
        kept = [hidden if layer.kind == "block" else 0 for layer in shape.layers]
    else:
        kept = saved

    frozen = frozen_names(shape, config.freeze)
    states = [_states(layer, per_parameter, frozen) for layer in shape.layers]
    if config.pipeline == 1 or config.schedule == "dualpipev":
        for tied in shape.tied:
            ends = {0, len(shape.layers) - 1}
            if config.pipeline == 1 or ends.issuperset(tied.layers):
                own = per_parameter.frozen if frozen.intersection(tied.names) else per_parameter.trained
                for layer in tied.layers[1:]:
                    states[layer] -= round(tied.parameters * own)

    # Logits, their softmax and their gradient, of the micro-batch or of a chunk of its tokens.
    tokens = micro_batch * config.seq_len
    chunk = loss_chunk(micro_batch, config.seq_len, shape.vocab_size, tokenwise=shape.tokenwise_head)
    logits = (chunk or tokens) * shape.vocab_size * 4
    once = [3 * logits if layer.kind == "head" else 0 for layer in shape.layers]

    largest = max(layer.parameters for layer in shape.layers)
    gathered = 2 * largest * weight if config.zero == 3 else 0
    bucket = min(shape.total_parameters // config.pipeline, 200_000_000) * weight if config.zero else 0
    again = max(saved) if config.activation_checkpointing else 0
    return Memory(
        states=tuple(states),
        once=tuple(once),
        kept=tuple(kept),
        boundary=2 * hidden if config.pipeline > 1 else 0,
        working=gathered + bucket + again,
        in_flight=micro_batches_in_flight(config.pipeline, config.schedule, accumulation),
    )


def _states(layer: Layer, per_parameter: StateBytes, frozen: Set[str]) -> int:
    still = sum(number for name, number in layer.tensors.items() if name in frozen)
    return round((layer.parameters - still) * per_parameter.trained + still * per_parameter.frozen)
