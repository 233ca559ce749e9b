"""What ZeRO-3 gathers in a step, followed module by module.

DeepSpeed notes the order of the modules from one forward pass to the next. While that order holds, it gathers what a
module needs, and ahead of it up to a bucket; it keeps what is met again soon, or what it has passed over while it
looked ahead, and gives the rest back. What it has once decided at a place it never decides again. Where another pass
comes, as at the edges of a pipeline's schedule, it forgets the order, gives back what it has gathered ahead, and
gathers module by module until it has noted a new one.

Source: DeepSpeed 0.19.8, ``partitioned_param_coordinator.py``.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from dstrain.config.schema import RunConfig
from dstrain.estimate.memory_activations import loss_rows
from dstrain.estimate.stage_parameters import PACKED_BYTES, gathered_elements, weight_bytes
from dstrain.planning.batch import Batch
from dstrain.planning.buffer_sizes import LIVE_PARAMETERS, PREFETCH_BUCKET, persistence_threshold
from dstrain.planning.layout import Layout
from dstrain.planning.model_shape import ModelShape

Module = tuple[tuple[str, int], ...]
"""The parameters that one module needs: name and elements."""

_FORWARD = -1

_Place = tuple[int, Module]
"""A module, and in a backward pass the number of its layer."""


@dataclass(frozen=True)
class Gathering:
    """Elements of parameters.

    Attributes:
        gathered: in a step.
        most: there at a time, at most.
        live: the same while a backward pass is in a layer: the last layer first.
    """

    gathered: int
    most: int
    live: tuple[int, ...]


def gathering(
    config: RunConfig, shape: ModelShape, layout: Layout, batch: Batch, stage: int, options: Mapping[str, Any]
) -> Gathering:
    """What a rank of a stage gathers in a step.

    Args:
        options: ``zero_optimization`` of the DeepSpeed JSON.
    """
    [chunk] = layout.chunks(stage)
    tokens = batch.micro_batch * batch.seq_len
    in_flight = min(layout.pipeline - stage, batch.accumulation)
    derived = persistence_threshold(shape.parameters_of((chunk,)))
    persistent = int(options.get("stage3_param_persistence_threshold", derived))
    limits = _Limits(
        bucket=int(options.get("stage3_prefetch_bucket_size", PREFETCH_BUCKET)),
        most_live=int(options.get("stage3_max_live_parameters", LIVE_PARAMETERS)),
        reuse=int(options.get("stage3_max_reuse_distance", LIVE_PARAMETERS)),
        persistent=persistent,
        packed=frozenset(name for index in chunk for name in shape.layers[index].quantized),
        packing=round(weight_bytes(config) / PACKED_BYTES / 2),
    )
    layers = tuple(_modules(config, shape, index, limits) for index in chunk)
    kinds = tuple(shape.layers[index].kind for index in chunk)
    # In the midst of a schedule each micro-batch is like the one before it.
    enough = in_flight + 4

    def followed(micro_batches: int) -> Gathering:
        chunks = -(-tokens // loss_rows(config, shape, batch.micro_batch))
        recomputed = config.activation_checkpointing
        return _followed(layers, kinds, limits, recomputed, chunks, micro_batches, in_flight)

    if batch.accumulation <= enough:
        return followed(batch.accumulation)
    before, last = followed(enough - 1), followed(enough)
    more = (batch.accumulation - enough) * (last.gathered - before.gathered)
    return replace(last, gathered=last.gathered + more)


@dataclass(frozen=True)
class _Limits:
    """Numbers of elements: of what is gathered ahead, may be there at a time, is soon met again, and always stays.

    Of a parameter that is ``packed``, an element here is ``packing`` bytes of its own.
    """

    bucket: int
    most_live: int
    reuse: int
    persistent: int
    packed: frozenset[str] = frozenset()
    packing: int = 1

    def stays(self, name: str, size: int) -> bool:
        return size * (self.packing if name in self.packed else 1) <= self.persistent


def _modules(config: RunConfig, shape: ModelShape, index: int, limits: _Limits) -> tuple[Module, ...]:
    """A layer's, about in the order of their use: as they are registered, with small ones, as norms are, before each
    part of it."""
    layer = shape.layers[index]
    tied = {name: (tied.key, tied.parameters) for tied in shape.tied for name in tied.names}
    found: dict[str, dict[str, int]] = {}
    for name in layer.tensors:
        key, size = tied.get(name, (name, gathered_elements(config, layer, name)))
        found.setdefault(name.rpartition(".")[0], {})[key] = size
    if not found:
        found[layer.name] = {layer.name: layer.parameters}
    places = [name.split(".") for name in found]
    depth = next((i for i, names in enumerate(zip(*places, strict=False)) if len(set(names)) > 1), 0)
    small: list[Module] = []
    parts: dict[str, list[Module]] = {}
    for name, parameters in found.items():
        module = tuple(parameters.items())
        if all(limits.stays(*each) for each in module):
            small.append(module)
        else:
            parts.setdefault(".".join(name.split(".")[: depth + 1]), []).append(module)
    if not parts:
        return tuple(small)
    ends = [len(small) * (number + 1) // len(parts) for number in range(len(parts))]
    begins = [0, *ends[:-1]]
    order = [[*small[a:b], *part] for a, b, part in zip(begins, ends, parts.values(), strict=True)]
    return tuple(itertools.chain.from_iterable(order))


@lru_cache(maxsize=512)
def _followed(
    layers: tuple[tuple[Module, ...], ...],
    kinds: tuple[str, ...],
    limits: _Limits,
    recomputed: bool,
    loss_chunks: int,
    micro_batches: int,
    in_flight: int,
) -> Gathering:
    """In a step behind another one, whose end DeepSpeed remembers."""
    forward, backward = _passes(layers, kinds, recomputed, loss_chunks)
    coordinator = _Coordinator(limits)
    warm_up = min(in_flight, micro_batches)
    before = 0
    for _ in range(3):
        before = coordinator.gathered
        coordinator.live.clear()
        for micro_batch in range(micro_batches):
            coordinator.begin()
            coordinator.run(forward)
            if micro_batch >= warm_up - 1:
                coordinator.run(backward)
        for _ in range(warm_up - 1):
            coordinator.run(backward)
    live = (coordinator.live.get(index, 0) for index in reversed(range(len(layers))))
    return Gathering(coordinator.gathered - before, max(coordinator.live.values()), tuple(live))


def _passes(
    layers: Sequence[Sequence[Module]], kinds: Sequence[str], recomputed: bool, loss_chunks: int
) -> tuple[list[_Place], list[_Place]]:
    """The modules of a forward and of a backward pass."""
    forward: list[_Place] = []
    backward: list[_Place] = []
    for index, (modules, kind) in enumerate(zip(layers, kinds, strict=True)):
        parts = loss_chunks if kind == "head" else 1
        again = loss_chunks > 1 if kind == "head" else recomputed and kind == "block"
        forward += [(_FORWARD, module) for module in modules] * parts
        again_and_back = [*modules] * again + [*reversed(modules)]
        backward = [(index, module) for module in again_and_back] * parts + backward
    return forward, backward


class _Coordinator:
    """DeepSpeed's, with the names of its states: an order of modules is invalid, noted, or complete."""

    def __init__(self, limits: _Limits) -> None:
        self.gathered = 0
        self.live: dict[int, int] = {}
        self._limits = limits
        self._noted: list[Module] | None = None
        self._trace: _Trace | None = None
        self._step = self._held = 0
        self._available = 0  # DeepSpeed's own count, which begins anew with each forward pass
        self._there: dict[str, int] = {}
        self._ahead: set[str] = set()
        self._decided: dict[tuple[int, Module], frozenset[str]] = {}

    def begin(self) -> None:
        """A forward pass begins."""
        self._give_back_ahead()
        if self._trace is None:
            if self._noted is not None:
                self._trace = _Trace(self._noted)
            self._noted = None if self._trace is not None else []
        else:
            self._trace.restart()
        self._step = self._available = 0

    def run(self, places: Sequence[_Place]) -> None:
        for layer, module in places:
            trace = self._trace
            if trace is not None and (self._step >= len(trace.order) or trace.order[self._step] != module):
                self._trace = trace = None
                self._give_back_ahead()
            if self._noted is not None:
                self._noted.append(module)
            for name, size in module:
                self._gather(name, size)
                self._ahead.discard(name)
            if trace is not None:
                trace.skip(self._step, module)
                self._prefetch(trace)
            self.live[layer] = max(self.live.get(layer, 0), self._held)
            self._step += 1
            staying = self._staying(trace, module) if trace is not None else frozenset[str]()
            for name, size in module:
                if name in self._there and name not in staying:
                    del self._there[name]
                    self._available -= size
                    self._held -= size

    def _gather(self, name: str, size: int) -> bool:
        if self._limits.stays(name, size) or name in self._there:
            return False
        self._there[name] = size
        self._available += size
        self.gathered += size
        self._held += size
        return True

    def _staying(self, trace: _Trace, module: Module) -> frozenset[str]:
        """Of a module's parameters those that are kept behind it: DeepSpeed caches the answer for good."""
        place = self._step, module
        if place not in self._decided:
            stays = (name for name, _ in module if trace.stays(self._step, name, self._limits.reuse))
            self._decided[place] = frozenset(stays)
        return self._decided[place]

    def _prefetch(self, trace: _Trace) -> None:
        room, fetched = min(self._limits.most_live - self._available, self._limits.bucket), 0
        while trace.queue and fetched < room:
            name, size = trace.pass_over()
            if self._gather(name, size):
                self._ahead.add(name)
                fetched += size

    def _give_back_ahead(self) -> None:
        for name in self._ahead:
            self._held -= self._there.pop(name, 0)
        self._ahead.clear()


class _Trace:
    """A complete order of modules, and how far it has been looked through."""

    def __init__(self, order: Sequence[Module]) -> None:
        self.order = order
        # Elements that are met before each module, and the module that needs a parameter next.
        self._before = [0]
        for module in order:
            self._before.append(self._before[-1] + sum(size for _, size in module))
        self._next: list[dict[str, int]] = []
        later: dict[str, int] = {}
        for step in range(len(order) - 1, -1, -1):
            self._next.append({name: later[name] for name, _ in order[step] if name in later})
            later.update((name, step) for name, _ in order[step])
        self._next.reverse()
        self.restart()

    def restart(self) -> None:
        self.queue = deque(
            (name, size, step) for step, module in enumerate(self.order) for name, size in module
        )
        self._fetched_for: dict[str, int] = {}

    def skip(self, step: int, module: Module) -> None:
        """Take what this module uses off the queue, if looking ahead has not done so."""
        needed = {name for name, _ in module if self._fetched_for.get(name, -1) < step}
        while needed and self.queue:
            name, _, used = self.queue.popleft()
            self._fetched_for[name] = used
            needed.discard(name)

    def pass_over(self) -> tuple[str, int]:
        name, size, used = self.queue.popleft()
        self._fetched_for[name] = max(used, self._fetched_for.get(name, -1))
        return name, size

    def stays(self, step: int, name: str, reuse: int) -> bool:
        """Whether a parameter of the module before this step is kept."""
        if self._fetched_for.get(name, -1) > step:
            return True
        next_use = self._next[step - 1].get(name)
        return next_use is not None and self._before[next_use] - self._before[step] < reuse
