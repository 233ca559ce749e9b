"""The parameters of one stage, as the memory estimate needs them."""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from dataclasses import dataclass

from dstrain.config.schema import RunConfig
from dstrain.optimizers import kept_states, optimizer_facts
from dstrain.planning.model_shape import Layer, ModelShape, Tied, frozen_names

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Of one number, by precision."""


PACKED_BYTES = 0.5
"""Of a weight in 4 bits, which ZeRO-3 can shard; without its scales."""


def weight_bytes(config: RunConfig) -> int:
    """Bytes of a weight in the precision that is computed with."""
    return BYTES[config.precision]


def moment_bytes(config: RunConfig) -> int:
    """Bytes of the optimizer's own state for one parameter."""
    return 4 * len(kept_states(optimizer_facts(config.optimizer), vars(config)))


def frozen_parameters(shape: ModelShape, chunks: Sequence[range], patterns: Sequence[str]) -> int:
    """Frozen parameters that a stage holds; a weight that two of its layers tie counts once."""
    if not patterns and not shape.has_adapters:
        return 0
    frozen = frozen_names(shape, patterns)
    key = {name: tied.key for tied in shape.tied for name in tied.names}
    sizes: dict[str, int] = {}
    for layer in (shape.layers[index] for chunk in chunks for index in chunk):
        for name, number in layer.tensors.items():
            if name in frozen:
                where = key.get(name, name)
                sizes[where] = max(number, sizes.get(where, 0))
    return sum(sizes.values())


def quantized_parameters(layer: Layer) -> int:
    """How many of a layer's parameters are quantized."""
    return sum(layer.tensors[name] for name in layer.quantized)


def gathered_elements(config: RunConfig, layer: Layer, name: str) -> int:
    """What ZeRO-3 gathers of a parameter, in elements of the precision that is computed with."""
    number = layer.tensors[name]
    return math.ceil(number * PACKED_BYTES / weight_bytes(config)) if name in layer.quantized else number


@dataclass(frozen=True)
class GatheredWeights:
    """What ZeRO-3 has gathered, as numbers of elements.

    Attributes:
        most: at a time.
        at_head: while a backward pass is in the head.
        at_end: while it is in its last layer.
        in_blocks: while it is in the blocks, beside all of a micro-batch's activations.
        at_bucket: when a bucket of gradients is full, beside the activations that are left then.
    """

    most: int = 0
    at_head: int = 0
    at_end: int = 0
    in_blocks: int = 0
    at_bucket: int = 0


@dataclass(frozen=True)
class Stage:
    """The parameters of a rank's stage, as numbers of elements.

    Attributes:
        trained, frozen: all of them; a weight that two of its layers tie counts once.
        quantized: of the frozen ones, those that are.
        quantized_bytes: what these take.
        tensor: the largest trained one.
        block: those of the largest block.
        in_blocks: the largest one of a block, whose gradient comes in the midst of a backward pass.
        in_head: the largest one of the head, whose gradient comes first; 0 where it waits for the embedding's.
        at_once: how much of the largest one ZeRO-1 and 2 reduce at a time, where it is larger than a bucket, at most.
        head_at_once: the same of that of the head.
        tied: of the trained weights that several layers use; each is an optimizer group of its own.
        both_ends: of those that two of this stage's layers use: their gradients meet.
        pass_through: of those that one backward pass meets: with dualpipev a stage's chunks have passes of their own.
        bucket: of the reductions, sized to the largest stage.
        replicas: across which ZeRO shards.
        loss: whether it computes the loss.
        alone: whether it is the only stage.
        gathered: by ZeRO-3.
    """

    trained: int
    frozen: int
    tensor: int
    block: int
    in_blocks: int
    in_head: int
    at_once: int
    head_at_once: int
    tied: tuple[int, ...]
    both_ends: int
    pass_through: int
    bucket: int
    replicas: int
    loss: bool
    alone: bool
    quantized: int = 0
    quantized_bytes: int = 0
    gathered: GatheredWeights = GatheredWeights()

    @property
    def group(self) -> int:
        """The largest optimizer group."""
        return max((self.trained - sum(self.tied), *self.tied))


def stage_parameters(
    shape: ModelShape,
    chunks: Sequence[range],
    patterns: Sequence[str],
    *,
    bucket: int,
    replicas: int,
    alone: bool,
) -> Stage:
    """The parameters of one stage's layers."""
    frozen_of = frozen_names(shape, patterns)
    layers = sorted({index for chunk in chunks for index in chunk})
    key = {name: tied.key for tied in shape.tied for name in tied.names}
    sizes: dict[str, int] = {}
    for index in layers:
        for name, number in shape.layers[index].tensors.items():
            if name not in frozen_of:
                sizes[key.get(name, name)] = max(number, sizes.get(key.get(name, name), 0))
    local = [tied for tied in shape.tied if set(tied.layers).intersection(layers) and tied.key in sizes]
    still = frozen_parameters(shape, chunks, patterns)
    trained = shape.parameters_of(tuple(chunks)) - still
    tied = tuple(tied.parameters for tied in local if len(tied.layers) > 1)
    tensor = max(sizes.values(), default=0)
    in_head = _largest(shape, chunks, frozen_of, "head")

    def at_once(size: int) -> int:
        """Its parts for the replicas, until they exceed a bucket: DeepSpeed's average_tensor, allreduce_and_scatter."""
        group = size if size in tied else trained - sum(tied)
        return min(size, bucket + -(-group // replicas))

    return Stage(
        trained=trained,
        frozen=still,
        tensor=tensor,
        block=max((shape.layers[i].parameters for i in layers if shape.layers[i].kind == "block"), default=0),
        in_blocks=_largest(shape, chunks, frozen_of, "block"),
        in_head=in_head,
        at_once=at_once(tensor),
        head_at_once=at_once(in_head),
        tied=tied,
        both_ends=sum(tied.parameters for tied in local if len(set(tied.layers).intersection(layers)) > 1),
        pass_through=min(trained, max(shape.parameters_of((chunk,)) for chunk in chunks)),
        bucket=bucket,
        replicas=replicas,
        loss=len(shape.layers) - 1 in layers,
        alone=alone,
        quantized=sum(quantized_parameters(shape.layers[index]) for index in layers),
        quantized_bytes=sum(sum(shape.layers[index].quantized.values()) for index in layers),
    )


def waiting_ties(shape: ModelShape, chunk: range, index: int) -> list[Tied]:
    """Weights that a layer shares with an earlier one of its chunk: their gradients wait for that one's."""
    return [
        tied
        for tied in shape.tied
        if index in tied.layers and any(other in chunk and other < index for other in tied.layers)
    ]


def _largest(shape: ModelShape, chunks: Sequence[range], frozen: Set[str], kind: str) -> int:
    """Of the weights of such layers, but those whose gradient waits for another layer's of the same pass."""
    largest = 0
    for chunk in chunks:
        for index in (index for index in chunk if shape.layers[index].kind == kind):
            late = {name for tied in waiting_ties(shape, chunk, index) for name in tied.names}
            sizes = shape.layers[index].tensors.items()
            largest = max([largest, *(number for name, number in sizes if name not in frozen | late)])
    return largest


def trained_of_layers(shape: ModelShape, chunk: range, patterns: Sequence[str]) -> dict[int, tuple[int, int]]:
    """Of each layer the trained parameters, and the largest of them, as numbers of elements.

    A weight that several layers of the chunk use counts with the last one, which a backward pass comes to first.
    """
    frozen = frozen_names(shape, patterns)
    found = {}
    for index in chunk:
        layer = shape.layers[index]
        still = sum(number for name, number in layer.tensors.items() if name in frozen)
        later = sum(
            tied.parameters
            for tied in shape.tied
            if index in tied.layers
            and any(index < other < chunk.stop for other in tied.layers)
            and frozen.isdisjoint(tied.names)
        )
        trained = layer.parameters - still - later
        sizes = [number for name, number in layer.tensors.items() if name not in frozen]
        found[index] = (trained, min(trained, max(sizes, default=0)))
    return found
