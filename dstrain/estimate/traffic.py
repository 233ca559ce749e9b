"""Estimates the traffic of an optimizer step: every collective and message, in bytes.

The formulas say what DeepSpeed 0.19.8 does with the JSON that a plan composes; tests/distributed/test_traffic.py
holds them to the bytes of real runs. A ring of n ranks sends (n - 1) / n of a tensor from each rank for a
reduce-scatter or an all-gather, and twice that for an all-reduce.

The ZeRO paper counts one reduce-scatter and one all-gather, 2 psi, for ZeRO-1 and 2. DeepSpeed all-reduces the
gradients, in fp32 as ``ds_configs/base.json`` has it, and then gathers the weights.

Source: Rajbhandari et al. 2020, ZeRO, section 7; Patarasuk and Yuan 2009, Bandwidth optimal all-reduce algorithms
for clusters of workstations.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from dstrain.config.schema import RunConfig
from dstrain.estimate.stage_parameters import BYTES, frozen_parameters
from dstrain.estimate.zero3_gathering import gathering
from dstrain.formatting import format_count
from dstrain.planning.batch import Batch
from dstrain.planning.buffer_sizes import LARGEST_BUCKET
from dstrain.planning.layout import Host, Layout
from dstrain.planning.model_shape import ModelShape, frozen_names


@dataclass(frozen=True)
class Traffic:
    """One kind of data that a rank sends in a step.

    Attributes:
        what: ``gradients``, ``weights``, ``tied weights``, ``activations``, ``activation gradients``, ...
        link: ``inside`` a host, ``between`` hosts, or ``host``: between a device and its host's memory.
        bytes: that one rank sends in a step.
        reason: how the number comes about, in words.
        messages: one after the other, each with its latency.
        lanes: ranks of a host that carry it out of the host side by side.
    """

    what: str
    link: str
    bytes: int
    reason: str
    messages: int = 1
    lanes: int = 1


def traffic(
    config: RunConfig,
    shape: ModelShape,
    layout: Layout,
    batch: Batch,
    deepspeed: Mapping[str, Any] | None = None,
) -> tuple[Traffic, ...]:
    """What the busiest rank sends in a step, for each kind of data.

    Args:
        deepspeed: the composed DeepSpeed JSON; None: as ``ds_configs/`` has it.
    """
    return busiest(
        stage_traffic(config, shape, layout, batch, stage, deepspeed) for stage in range(layout.pipeline)
    )


def busiest(stages: Iterable[Iterable[Traffic]]) -> tuple[Traffic, ...]:
    """Of each kind of data what takes longest: over the slower link, then the most bytes."""
    found: dict[str, Traffic] = {}
    for sent in itertools.chain.from_iterable(stages):
        known = found.get(sent.what)
        if known is None or (sent.link == "between", sent.bytes) > (known.link == "between", known.bytes):
            found[sent.what] = sent
    return tuple(found.values())


def stage_traffic(
    config: RunConfig,
    shape: ModelShape,
    layout: Layout,
    batch: Batch,
    stage: int,
    deepspeed: Mapping[str, Any] | None = None,
) -> tuple[Traffic, ...]:
    """What a rank of this stage sends in a step: among its replicas, along the pipeline, to its host's memory."""
    return (
        *_among_replicas(config, shape, layout, batch, stage, deepspeed or {}),
        *_tied(config, shape, layout, stage),
        *_pipeline(config, shape, layout, batch, stage),
        *_offload(config, shape, layout, batch, stage),
    )


def trained_parameters(config: RunConfig, shape: ModelShape, layout: Layout, stage: int) -> int:
    """Those that get gradients on a rank of this stage before ZeRO shares anything out."""
    chunks = layout.chunks(stage)
    return shape.parameters_of(chunks) - frozen_parameters(shape, chunks, config.freeze)


def _among_replicas(
    config: RunConfig,
    shape: ModelShape,
    layout: Layout,
    batch: Batch,
    stage: int,
    deepspeed: Mapping[str, Any],
) -> list[Traffic]:
    n = layout.data_parallel
    if n == 1:
        return []
    link, lanes = _replicas_meet(layout.slots, layout.pipeline, n, stage)
    wide = BYTES[(deepspeed.get("communication_data_type", "fp32") or config.precision).lower()]
    keys = deepspeed.get("zero_optimization", {})
    weight = BYTES[config.precision]
    trained = trained_parameters(config, shape, layout, stage)
    whole = shape.parameters_of(layout.chunks(stage))
    m = batch.accumulation
    each = f"each of {m} micro-batches" if m > 1 else "the one micro-batch"

    def ring(times: float, size: int) -> int:
        return round(times * (n - 1) / n * size)

    def sent(what: str, size: int, often: int, reason: str) -> Traffic:
        bucket = max(1, keys.get("reduce_bucket_size", LARGEST_BUCKET))
        buckets = -(-max(trained, whole) // bucket)
        return Traffic(what, link, size, reason, messages=often * buckets * (n - 1).bit_length(), lanes=lanes)

    if config.zero == 3:
        gathered = gathering(config, shape, layout, batch, stage, keys).gathered
        return [
            sent(
                "weights", ring(1, gathered * weight), 2 * m,
                f"ZeRO-3 gathers {gathered / whole / m:.3g} x {whole:,} of them for forward and backward pass of"
                f" {each}: {n - 1}/{n} x {gathered:,} x {weight} B",
            ),
            sent(
                "gradients", ring(m, trained * wide), m,
                f"ZeRO-3 reduces and scatters them behind {each}: {n - 1}/{n} x {m} x {trained:,} x {wide} B",
            ),
        ]  # fmt: skip
    often = m if config.zero == 2 else 1
    when = f"behind {each}" if config.zero == 2 else "once a step"
    to_owners = config.zero and not keys.get("use_multi_rank_bucket_allreduce", True)
    twice, how = (1, "reduced to its owner") if to_owners else (2, "all-reduced")
    found = [
        sent(
            "gradients", ring(twice * often, trained * wide), often,
            f"{how} {when}: {twice} x {n - 1}/{n} x {often} x {trained:,} x {wide} B",
        )
    ]  # fmt: skip
    if config.zero:
        found.append(
            sent(
                "weights", ring(1, trained * weight), 1,
                f"each rank's updated share is gathered once a step: {n - 1}/{n} x {trained:,} x {weight} B",
            )
        )  # fmt: skip
    return found


def _tied(config: RunConfig, shape: ModelShape, layout: Layout, stage: int) -> list[Traffic]:
    """Weights that several stages hold: their gradients are summed over these."""
    size, stages = 0.0, set()
    shared = layout.data_parallel if config.zero else 1
    frozen = frozen_names(shape, config.freeze)
    for tied in shape.tied:
        if not _holds(layout, stage, tied.layers) or not frozen.isdisjoint(tied.names):
            continue
        holding = {other for other in range(layout.pipeline) if _holds(layout, other, tied.layers)}
        size += 2 * (len(holding) - 1) / len(holding) * tied.parameters * 4 / shared
        stages |= holding
    if len(stages) < 2:
        return []
    hosts = (
        {layout.host(layout.rank(other, replica)) for other in stages}
        for replica in range(layout.data_parallel)
    )
    link = "between" if any(len(met) > 1 for met in hosts) else "inside"
    of = f"each replica 1/{shared} of it, " if shared > 1 else ""
    return [
        Traffic(
            "tied weights", link, round(size),
            f"the stages that hold a copy sum its gradient once a step ({of}in fp32)",
            messages=(len(stages) - 1).bit_length(),
        )
    ]  # fmt: skip


def _holds(layout: Layout, stage: int, layers: Sequence[int]) -> bool:
    return any(layer in chunk for chunk in layout.chunks(stage) for layer in layers)


def _pipeline(
    config: RunConfig, shape: ModelShape, layout: Layout, batch: Batch, stage: int
) -> list[Traffic]:
    """What goes to the next stage and back for each micro-batch: hidden states, and their gradients.

    DeepSpeed's own dualpipev sends positions with them.
    """
    if layout.pipeline == 1:
        return []
    tokens = batch.micro_batch * batch.seq_len
    hidden = tokens * shape.hidden_size * BYTES[config.precision]
    positions = tokens * 8 * (layout.schedule == "dualpipev")
    beside = " + 8 B of positions" if positions else ""
    out, back = messages_along(layout, stage)
    m = batch.accumulation
    link = "between" if _crosses(layout.slots, layout.pipeline, layout.data_parallel, stage) else "inside"
    found = []
    if out:
        found.append(
            Traffic(
                "activations", link, out * m * (hidden + positions),
                f"{format_count(m, 'micro-batch')} x {out} x {tokens:,} tokens x ({shape.hidden_size:,} x"
                f" {BYTES[config.precision]} B{beside})",
                messages=(1 + (positions > 0)) * out * m,
            )
        )  # fmt: skip
    if back:
        found.append(
            Traffic(
                "activation gradients", link, back * m * hidden,
                f"{format_count(m, 'micro-batch')} x {back} x {tokens:,} tokens x {shape.hidden_size:,} x"
                f" {BYTES[config.precision]} B",
                messages=back * m,
            )
        )  # fmt: skip
    return found


def messages_along(layout: Layout, stage: int) -> tuple[int, int]:
    """How often a stage sends hidden states, and gradients, for each micro-batch."""
    if layout.pipeline == 1:
        return 0, 0
    first, last = stage == 0, stage == layout.pipeline - 1
    if layout.schedule == "dualpipev":  # it holds a chunk on the way out and one on the way back
        return (not last) + (not first), (not first) + (not last)
    return int(not last), int(not first)


def _offload(config: RunConfig, shape: ModelShape, layout: Layout, batch: Batch, stage: int) -> list[Traffic]:
    """Gradients to the host's memory, updated weights back: read in DeepSpeed's copies, not counted."""
    if config.offload == "none":
        return []
    share = trained_parameters(config, shape, layout, stage) // (layout.data_parallel if config.zero else 1)
    weight, m = BYTES[config.precision], batch.accumulation
    if config.zero == 3:
        copies, why = 2 * m - 1, "behind each micro-batch, and those before it back to be added up"
    elif config.precision != "fp32" or m == 1:
        copies, why = 1, "once a step: they are added up on the device"
    elif config.zero == 2:
        copies, why = 2 * m, "behind each micro-batch, and those before it back to be added up"
    else:
        copies, why = 3, "once a step, through a buffer that is read and written"
    return [
        Traffic(
            "offloaded gradients", "host", 4 * share * copies,
            f"in fp32 to the host's memory {why}: {copies} x {share:,} x 4 B", messages=copies,
        ),
        Traffic(
            "offloaded weights", "host", weight * share,
            f"updated ones back to the device once a step: {share:,} x {weight} B",
        ),
    ]  # fmt: skip


# Kept: `dstrain plan --fit` asks for the same ranks again and again.


@lru_cache(maxsize=4096)
def _replicas_meet(slots: tuple[int, ...], pipeline: int, replicas: int, stage: int) -> tuple[str, int]:
    """`_meeting` of a stage's replicas, on hosts with so many ranks each."""
    layout = _on(slots, pipeline, replicas)
    return _meeting(layout, [layout.rank(stage, replica) for replica in range(replicas)])


@lru_cache(maxsize=4096)
def _crosses(slots: tuple[int, ...], pipeline: int, replicas: int, stage: int) -> bool:
    """Whether an adjacent stage lies on another host, in any replica."""
    layout = _on(slots, pipeline, replicas)
    return any(
        layout.host(layout.rank(at, replica)) != layout.host(layout.rank(at + 1, replica))
        for replica in range(replicas)
        for at in (stage - 1, stage)
        if 0 <= at < pipeline - 1
    )


@lru_cache(maxsize=64)
def _on(slots: tuple[int, ...], pipeline: int, replicas: int) -> Layout:
    """A layout whose ranks lie so; what they hold does not matter."""
    hosts = tuple(Host(str(number), size) for number, size in enumerate(slots))
    return Layout(hosts, pipeline, replicas, tuple(range(pipeline + 1)))


def _meeting(layout: Layout, ranks: Sequence[int]) -> tuple[str, int]:
    """The slowest link among these ranks, and how many of them a host holds at least."""
    hosts = Counter(layout.host(rank) for rank in ranks)
    return ("inside", 1) if len(hosts) == 1 else ("between", min(hosts.values()))
