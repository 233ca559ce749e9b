"""A backward pass layer by layer: the activations of a micro-batch go while gradients come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dstrain.estimate.stage_parameters import trained_of_layers, waiting_ties
from dstrain.planning.model_shape import ModelShape, frozen_names


@dataclass(frozen=True)
class PassedLayer:
    """A layer that a backward pass comes to.

    Attributes:
        kept: bytes that it has kept of the micro-batch.
        working: bytes that its pass takes beside these, recomputation included.
        trained: elements of the gradients that it brings; of a weight that a later layer of the pass uses too, none.
        largest: elements of the largest of them.
        waiting: elements of those gradients that wait for another layer's, to become one.
    """

    kept: int
    working: int
    trained: int
    largest: int
    waiting: int = 0


Pass = tuple[PassedLayer, ...]
"""In the order of the pass: the last layer first."""


def passed_layers(
    shape: ModelShape, chunk: range, patterns: Sequence[str], kept: dict[int, int], working: dict[int, int]
) -> Pass:
    """The backward pass over a chunk.

    Args:
        patterns: of names that are frozen.
        kept, working: bytes by the number of the layer; a layer without an entry is not come to.
    """
    trained = trained_of_layers(shape, chunk, patterns)
    frozen = frozen_names(shape, patterns)

    def waiting(index: int) -> int:
        return sum(
            tied.parameters
            for tied in waiting_ties(shape, chunk, index)
            if index == max(i for i in tied.layers if i in chunk) and frozen.isdisjoint(tied.names)
        )

    return tuple(
        PassedLayer(kept[index], working[index], *trained[index], waiting(index))
        for index in reversed(chunk)
        if index in kept
    )


def growing(layers: Pass, gradient: int, weight: int) -> int:
    """The most bytes of one micro-batch's activations and of the gradients that stay, at one moment of the pass.

    Args:
        gradient: bytes of an element of a gradient that stays.
        weight: bytes of one on its way there.
    """
    alive = most = sum(layer.kept for layer in layers)
    for layer in layers:
        most = max(most, alive + layer.working + weight * layer.largest)
        alive += gradient * layer.trained - layer.kept
    return max(most, alive)


def arriving(layers: Pass, gradient: int) -> int:
    """The most bytes beside the activations that are there when the pass begins: gradients on their way, and workings.

    An embedding's gradient comes when the micro-batch's activations are gone, a head's while all of them are there.

    Args:
        gradient: bytes of an element of one.
    """
    gone = most = 0
    for layer in layers:
        most = max(most, layer.working + gradient * layer.largest - gone)
        gone += layer.kept
    return most


def beside_activations(layers: Pass, live: Sequence[int], weight: int, *, bucket: int = 0) -> int:
    """Elements of weights that are gathered beside the activations that are there when the pass begins, at most.

    Args:
        live: gathered while the pass is in a layer, the last layer first.
        weight: bytes of an element.
        bucket: begin only when a bucket of so many gradients is full, with the activations that are there then.
    """
    gone = passed = most = 0
    for layer, elements in zip(layers, live, strict=False):
        passed += layer.trained - layer.waiting
        if passed >= bucket:
            most = max(most, elements - gone // weight)
            gone += layer.kept
    return most


def left_at(layers: Pass, elements: int) -> int:
    """Bytes of the activations that are there when a bucket of so many gradients is full; 0: they all fit into it."""
    passed, left = 0, sum(layer.kept for layer in layers)
    for layer in layers:
        passed += layer.trained - layer.waiting
        if passed > elements:
            return left
        left -= layer.kept
    return 0
