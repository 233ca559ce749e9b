"""Estimates gradients and DeepSpeed's buffers at the moments of peak memory in a step.

The numbers are those of DeepSpeed 0.19.8, read in its source and measured: the buckets of ``stage_1_and_2.py``
(setup_buckets, reduce_gradients, allreduce_bucket, copy_grads_in_partition) and ``stage3.py`` (ipg_buckets,
__avg_scatter_grads, _prepare_fp32_grad_for_sub_group) are sized to the largest stage, and live beside copies of what
they hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dstrain.config.schema import RunConfig
from dstrain.estimate.stage_parameters import PACKED_BYTES, Stage, weight_bytes
from dstrain.optimizers import optimizer_facts
from dstrain.planning.buffer_sizes import PREFETCH_BUCKET, SUB_GROUP

ZERO_0_BUCKET = 500_000_000
"""Gradients that are reduced at a time without ZeRO: DeepSpeed's default, an element each."""


@dataclass(frozen=True)
class Moment:
    """Bytes of the gradients that are held, and of buffers, at one moment of a step."""

    gradients: int
    buffers: int

    @property
    def total(self) -> int:
        return self.gradients + self.buffers


@dataclass(frozen=True)
class Moments:
    """The moments of a step at which a rank may be fullest.

    Attributes:
        loss: the loss of the last micro-batch is computed, and all activations are there.
        backward: the last layers' gradients arrive.
        reduction: all gradients are there and are reduced over the replicas, or the first weights are gathered; the
            activations of the micro-batch are gone, or not there yet.
        step: the optimizer works.
        forward: a forward pass, with the weights that ZeRO-3 has gathered for it.
        bucket: a bucket is full and reduced in the midst of a backward pass, with ZeRO-2 and 3.
        head: the head's gradient, which is larger than a bucket, is reduced by itself, with ZeRO-2.
        passing: bytes of single gradients on their way to where they are held; part of ``backward``.
        arriving: bytes of an element of a gradient that arrives, with what it is added to meanwhile; as many of the
            largest tensor's are part of ``backward``. 0: gradients of a weight that is used twice wait for each other.
        gradients: the most bytes of gradients at any moment.
    """

    gradients: int
    loss: Moment
    backward: Moment
    reduction: tuple[Moment, ...]
    step: Moment
    forward: Moment = Moment(0, 0)
    bucket: Moment = Moment(0, 0)
    head: Moment = Moment(0, 0)
    passing: int = 0
    arriving: int = 0

    @property
    def reduced(self) -> int:
        """The most bytes at any moment of the reduction."""
        return max(moment.total for moment in self.reduction)


@dataclass(frozen=True)
class _Terms:
    """What the formulas of all ZeRO stages are made of, in bytes, but ``share`` and ``filled``: elements.

    Attributes:
        share: of the trained parameters, this rank's.
        filled: what a bucket holds of them at a time.
        passing: gradients on their way to where they are held.
        flat: a copy of the gradients in one piece, which the optimizer takes.
        step: what the optimizer takes beside its state.
        standing: what offloading keeps for copies between the memories.
        masters: gradients of the fp32 masters, where offloading keeps them on this device: on CPUs.
    """

    share: int
    filled: int
    weight: int
    passing: int
    flat: int
    step: int
    standing: int
    masters: int
    on_cpu: bool
    offloaded: bool
    several: bool
    later: bool

    @property
    def fp32(self) -> bool:
        return self.weight == 4


def moments_of_step(
    config: RunConfig,
    stage: Stage,
    share: int,
    accelerator: str,
    zero_options: Mapping[str, Any],
    *,
    several: bool,
    later: bool,
) -> Moments:
    """Of one rank; the arguments are those of `dstrain.estimate.memory_states.states`.

    Args:
        share: elements of the trained parameters whose optimizer states this rank has.
    """
    weight = weight_bytes(config)
    on_cpu = accelerator == "cpu"
    offloaded = config.offload != "none"
    # Of a weight that two of its layers use: two gradients that meet, and in fp32 their sum.
    meeting = stage.both_ends * (3 if weight == 4 else 1)
    terms = _Terms(
        share=share,
        filled=min(stage.bucket, stage.trained),
        weight=weight,
        passing=weight * max(stage.tensor, meeting),
        flat=0 if offloaded else 4 * -(-stage.group // stage.replicas),
        step=_optimizer_temporaries(config, stage, on_cpu),
        standing=_standing(config, stage, share, on_cpu),
        masters=4 * share * (offloaded and on_cpu),
        on_cpu=on_cpu,
        offloaded=offloaded,
        several=several,
        later=later,
    )
    if config.zero == 0:
        found, arriving = _zero_0(stage, terms), weight * later
    elif config.zero == 1:
        found, arriving = _zero_1(stage, terms), weight + 4 * (several and later and not terms.fp32)
    elif config.zero == 2:
        found, arriving = _zero_2(stage, terms), weight
    else:
        found, arriving = _zero_3(config, stage, terms, zero_options), weight
    return found if stage.both_ends else replace(found, arriving=arriving)


def host_beside_optimizer(config: RunConfig, stage: Stage, share: int) -> int:
    """Bytes of host memory that offloading takes beside masters and moments: gradients in fp32, and copies."""
    if config.zero == 3:
        return (4 + 4) * share
    accumulated = 4 * share * (config.zero == 2 and config.precision == "fp32")
    return (4 + weight_bytes(config)) * share + weight_bytes(config) * stage.tensor + accumulated


def _zero_0(stage: Stage, terms: _Terms) -> Moments:
    whole = terms.weight * stage.trained
    return Moments(
        gradients=whole,
        loss=Moment(whole * terms.later, 0),
        backward=Moment(whole * terms.later, terms.passing * terms.later),
        reduction=(Moment(whole, terms.weight * min(stage.trained, ZERO_0_BUCKET)),),
        step=Moment(whole, terms.step),
    )


def _zero_1(stage: Stage, terms: _Terms) -> Moments:
    """Accumulators in fp32 for all parameters; a bucket that stays from the first micro-batch to the last.

    They are reduced behind the last backward pass, bucket by bucket: what the bucket holds has left its accumulators,
    and this rank's shares are made with the first one. What is larger than a bucket is reduced by itself.
    """
    whole, own = 4 * stage.trained, 4 * terms.share * (not (terms.offloaded and terms.fp32))
    bucket = 4 * stage.bucket
    copied = 4 * terms.filled * (stage.replicas > 1 or not terms.fp32)
    if terms.offloaded and terms.fp32:
        copied = max(copied, 8 * stage.tensor)  # its norm in fp64
    kept = bucket * (stage.replicas > 1 and not terms.fp32)  # the other replicas' gradients look at it
    raised = 4 * stage.tensor * terms.several * (not terms.fp32)  # one is added to its accumulator
    masters, standing = terms.masters, terms.standing
    # With stages the engine brings a second bucket along, see reduce_gradients.
    buckets = bucket * (1 if stage.alone else 2) + standing
    reductions = [
        Moment(whole + masters, buckets),
        Moment(whole - 4 * terms.filled + own + masters, buckets + copied),
    ]
    if stage.tensor > stage.bucket:
        alone = 4 * stage.at_once * (stage.replicas > 1)
        made = 4 * -(-stage.tensor // stage.replicas) * bool(own) if stage.tensor in stage.tied else own
        reductions.append(Moment(whole + made + masters, buckets + alone))
    return Moments(
        gradients=max(whole + raised + masters, *(moment.gradients for moment in reductions)),
        loss=Moment(whole * terms.later + masters, bucket * terms.later + standing),
        backward=Moment((whole + raised) * terms.later + masters, bucket + terms.passing + standing),
        reduction=tuple(reductions),
        passing=terms.passing,
        step=Moment(own + masters, kept + terms.flat * terms.fp32 + terms.step + standing),
    )


def _zero_2(stage: Stage, terms: _Terms) -> Moments:
    """This rank's share of the gradients; each micro-batch's are reduced in a bucket of their own."""
    bucket = terms.weight * stage.bucket
    filled = min(terms.filled, stage.pass_through)
    held = 4 * terms.share
    if terms.fp32:
        reduced = 4 * filled * (stage.replicas > 1)
        if terms.offloaded:
            held *= terms.on_cpu  # accumulated in host memory
        else:
            reduced = max(reduced, 4 * terms.share * terms.several)
            # Each replica holds all of a tensor of which it has a share; the tied ones are groups of their own.
            held += 4 * sum(size - size // stage.replicas for size in stage.tied)
    else:
        reduced = (2 + 4) * filled
    masters, standing = terms.masters, terms.standing

    def reduction(tensor: int, at_once: int, held: int) -> Moment:
        """With this as the largest tensor."""
        alone = 0
        if tensor > stage.bucket:  # its gradient, and what a bucket's copies would be
            alone = 4 * (tensor + at_once) if terms.fp32 else 2 * tensor + (2 + 4) * at_once
        if terms.fp32 and terms.offloaded:
            alone = max(alone, 8 * tensor)
        return Moment(held + masters, bucket + max(reduced, alone) + standing)

    # Of one micro-batch the shares are made one after the other.
    arrived = 4 * -(-(stage.in_head + stage.block + stage.bucket) // stage.replicas)
    first, midst = (held, held) if terms.several else (0, min(held, arrived))
    return Moments(
        gradients=held + masters,
        loss=Moment(held * terms.later + masters, standing),
        backward=Moment(held * terms.later + masters, bucket + terms.passing + standing),
        reduction=(reduction(stage.tensor, stage.at_once, held),),
        bucket=_with_waiting(reduction(stage.in_blocks, stage.in_blocks, midst), stage, terms),
        head=reduction(stage.in_head, stage.head_at_once, first)
        if stage.in_head > stage.bucket
        else Moment(0, 0),
        passing=terms.passing,
        step=Moment(held + masters, terms.flat * terms.fp32 + terms.step + standing),
    )


def _zero_3(config: RunConfig, stage: Stage, terms: _Terms, zero_options: Mapping[str, Any]) -> Moments:
    """Shares of gradients in one buffer and a bucket, both for good; gathered weights."""
    bucket = 4 * stage.bucket
    ahead = int(zero_options.get("stage3_prefetch_bucket_size", PREFETCH_BUCKET))
    gathered = terms.weight * stage.gathered.in_blocks
    # Behind a backward pass that began at the loss they are given back, but for the embedding.
    left = terms.weight * min(stage.gathered.at_end, stage.tensor * stage.alone)
    if not stage.loss:
        # Where a bucket holds all gradients, those of the embedding bring on the only reduction.
        left = terms.weight * (
            stage.gathered.most if stage.trained <= stage.bucket else stage.gathered.at_end
        )
    # What is gathered at a time arrives in one piece, and is copied out of it.
    unpacked = stage.trained + stage.frozen - stage.quantized
    arriving = round(min(terms.weight * unpacked + PACKED_BYTES * stage.quantized, terms.weight * ahead))
    arriving *= stage.replicas > 1
    sub_group = min(terms.share, int(zero_options.get("sub_group_size", SUB_GROUP)))
    step = min(terms.step, _step_of(config, sub_group, terms.on_cpu))

    def copies(tensor: int) -> int:
        """What is reduced and scattered at a time: a bucket, or this tensor by itself, with its gradient."""
        alone = (4 * (1 + terms.on_cpu) + terms.weight) * tensor if tensor > stage.bucket else 0
        return max(4 * (1 + terms.on_cpu) * terms.filled, alone)  # gloo's reduce-scatter copies once more

    held = terms.masters + 4 * terms.share * (terms.on_cpu or not terms.offloaded)
    return Moments(
        gradients=held,
        forward=Moment(held, bucket + terms.weight * stage.gathered.most + arriving),
        loss=Moment(held, bucket + terms.weight * stage.gathered.at_head),
        backward=Moment(held, bucket + gathered + terms.passing),
        reduction=(
            Moment(held, bucket + copies(stage.tensor) + left),
            Moment(held, bucket + gathered + arriving),
        ),
        passing=terms.passing,
        bucket=_with_waiting(
            Moment(held, bucket + copies(stage.in_blocks) + terms.weight * stage.gathered.at_bucket),
            stage,
            terms,
        ),
        step=Moment(held, bucket + step + (0 if terms.offloaded else 4 * sub_group)),
    )


def _with_waiting(moment: Moment, stage: Stage, terms: _Terms) -> Moment:
    """The gradient of a weight that a pass uses twice waits for its other half meanwhile."""
    return replace(moment, buffers=moment.buffers + terms.weight * stage.both_ends)


def _standing(config: RunConfig, stage: Stage, share: int, on_cpu: bool) -> int:
    """A gradient's copy, and where host and device are one memory its copy there and the weights on their way back."""
    if config.offload == "none" or config.zero == 3:
        return 0
    weight = weight_bytes(config)
    return weight * (2 * stage.tensor + share) if on_cpu else weight * stage.tensor


def _optimizer_temporaries(config: RunConfig, stage: Stage, on_cpu: bool) -> int:
    """What the optimizer's step takes beside its state.

    An optimizer of offloaded states works in host memory, and DeepSpeed's own kernels there take nothing.

    With ZeRO a whole group is one tensor of which each replica has its share. On accelerators torch's optimizers
    take all tensors of a group together.
    """
    own_kernel = optimizer_facts(config.optimizer).offloaded_update_bytes is not None
    if config.offload != "none" and (own_kernel or not on_cpu):
        return 0
    largest = stage.tensor if config.zero == 0 else -(-stage.group // stage.replicas)
    together = stage.trained if config.zero == 0 else largest
    return _step_of(config, largest if on_cpu else together, on_cpu)


def _step_of(config: RunConfig, elements: int, on_cpu: bool) -> int:
    """What one step takes that works on so many elements at a time."""
    facts = optimizer_facts(config.optimizer)
    decayed_gradient = 4 * (config.weight_decay > 0 and not facts.decoupled_decay)
    return elements * (facts.temporary_bytes["cpu" if on_cpu else "cuda"] + decayed_gradient)
