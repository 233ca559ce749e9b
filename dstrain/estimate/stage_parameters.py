"""The parameters of one stage, as the memory estimate needs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dstrain.config.schema import RunConfig
from dstrain.optimizers import kept_states, optimizer_facts
from dstrain.planning.model_shape import ModelShape, frozen_names

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Of one number, by precision."""


def weight_bytes(config: RunConfig) -> int:
    """Bytes of a weight in the precision that is computed with."""
    return BYTES[config.precision]


def moment_bytes(config: RunConfig) -> int:
    """Bytes of the optimizer's own state for one parameter."""
    return 4 * len(kept_states(optimizer_facts(config.optimizer), vars(config)))


def frozen_parameters(shape: ModelShape, chunks: Sequence[range], patterns: Sequence[str]) -> int:
    """Frozen parameters that a stage holds; a weight that two of its layers tie counts once."""
    if not patterns:
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


@dataclass(frozen=True)
class Stage:
    """The parameters of a rank's stage, as numbers of elements.

    Attributes:
        trained, frozen: all of them; a weight that two of its layers tie counts once.
        tensor: the largest trained one.
        tied: of the trained weights that several layers use; each is an optimizer group of its own.
        both_ends: of those that two of this stage's layers use: their gradients meet.
        pass_through: of those that one backward pass meets: with dualpipev a stage's chunks have passes of their own.
        bucket: of the reductions, sized to the largest stage.
        replicas: across which ZeRO shards.
        loss: whether it computes the loss.
        alone: whether it is the only stage.
    """

    trained: int
    frozen: int
    tensor: int
    tied: tuple[int, ...]
    both_ends: int
    pass_through: int
    bucket: int
    replicas: int
    loss: bool
    alone: bool

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
    return Stage(
        trained=trained,
        frozen=still,
        tensor=max(sizes.values(), default=0),
        tied=tuple(tied.parameters for tied in local if len(tied.layers) > 1),
        both_ends=sum(tied.parameters for tied in local if len(set(tied.layers).intersection(layers)) > 1),
        pass_through=min(trained, max(shape.parameters_of((chunk,)) for chunk in chunks)),
        bucket=bucket,
        replicas=replicas,
        loss=len(shape.layers) - 1 in layers,
        alone=alone,
    )


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
