"""The candidates of ``fit``: every valid layout, micro-batch and recomputation choice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

from dstrain.config.loader import ResolvedConfig
from dstrain.planning.batch import make_batch
from dstrain.planning.layout import Host, count_chunks, fill_hosts
from dstrain.planning.layout_names import LayoutChoice
from dstrain.planning.model_shape import ModelShape
from dstrain.planning.partition import blocks_of_chunks
from dstrain.planning.recipe_values import fitting_micro_batch

FREE = ("zero", "pipeline", "data_parallel", "schedule", "offload", "micro_batch", "activation_checkpointing")
"""The run-config keys that `fit` may choose: none of them changes what is trained."""


@dataclass(frozen=True)
class Candidate:
    """One choice of all that is free."""

    layout: LayoutChoice
    micro_batch: int
    activation_checkpointing: bool

    @cached_property
    def flags(self) -> dict[str, Any]:
        """The run-config keys of this choice."""
        return {
            **self.layout.flags(),
            "micro_batch": self.micro_batch,
            "activation_checkpointing": self.activation_checkpointing,
        }

    @property
    def simplicity(self) -> tuple[int, ...]:
        """The less the simpler: what is taken where times are all but equal."""
        layout = self.layout
        return (
            layout.pipeline,
            layout.zero,
            layout.offload != "none",
            self.activation_checkpointing,
            layout.schedule != "1f1b",
        )


@dataclass(frozen=True)
class Candidates:
    """Those that can be trained, and how many others there are for each reason against them."""

    accepted: list[Candidate]
    refused: Counter[str]


def fixed_choices(resolved: ResolvedConfig) -> dict[str, Any]:
    """What the user has chosen: in a file of their own, with ``--set`` or a flag. A recipe's word is not theirs."""
    return {
        key: getattr(resolved.config, key)
        for key in FREE
        if resolved.origin(key).kind in ("file", "set", "flag") and getattr(resolved.config, key) is not None
    }


def find_candidates(
    resolved: ResolvedConfig, shape: ModelShape, hosts: tuple[Host, ...], *, device_is_host: bool
) -> Candidates:
    """All candidates on these hosts, whose slots are counted. The global batch stays as it is.

    For each number of stages there are as many replicas as share the global batch and the hosts evenly.

    Args:
        device_is_host: on CPUs nothing is gained by offloading to host memory.
    """
    config = resolved.config
    fixed = fixed_choices(resolved)
    if shape.router_loss:
        # A router's loss is taken over a micro-batch: another one would train another model.
        fixed.setdefault("micro_batch", _micro_batch_of(resolved, hosts))
    if shape.row_leak:
        fixed.setdefault("micro_batch", 1)
    found = Candidates([], Counter())
    offloads = fixed_or(fixed, "offload", ("none",) if device_is_host else ("none", "cpu"))
    recomputations = fixed_or(fixed, "activation_checkpointing", (False, True))
    for pipeline in fixed_or(fixed, "pipeline", range(1, _most_stages(shape, hosts) + 1)):
        replicas = _replicas(config.global_batch, pipeline, hosts, fixed.get("data_parallel"), shape)
        if replicas is None:
            found.refused["no number of replicas divides the global batch and the hosts evenly"] += 1
            continue
        sizes = _micro_batches(config.global_batch // replicas, fixed.get("micro_batch"))
        inner = list(product(sizes, recomputations))
        for zero, schedule, offload in product(
            fixed_or(fixed, "zero", (0, 1, 2, 3)),
            fixed_or(fixed, "schedule", ("1f1b", "dualpipev") if pipeline > 1 else ("1f1b",)),
            offloads,
        ):
            layout = LayoutChoice(zero, pipeline, replicas, schedule, offload)
            reason = _reason_against(layout, resolved, shape)
            if reason is not None:
                found.refused[reason] += max(1, len(inner))
            elif not inner:
                found.refused["the micro-batch does not divide a replica's share of the global batch"] += 1
            for micro_batch, again in inner if reason is None else ():
                accumulation = config.global_batch // (replicas * micro_batch)
                if schedule == "dualpipev" and accumulation < 2 * pipeline:
                    found.refused["dualpipev needs two micro-batches per stage"] += 1
                else:
                    found.accepted.append(Candidate(layout, micro_batch, again))
    return found


def fixed_or(fixed: dict[str, Any], key: str, free: Sequence[Any]) -> Sequence[Any]:
    """The one value that the user has chosen, or all that there are."""
    return (fixed[key],) if key in fixed else free


def even_hosts(hosts: tuple[Host, ...], ranks: int) -> bool:
    """Whether so many ranks fill the hosts that they need with as many on each."""
    filled = fill_hosts(hosts, ranks)
    return sum(host.slots for host in filled) == ranks and len({host.slots for host in filled}) == 1


def _reason_against(layout: LayoutChoice, resolved: ResolvedConfig, shape: ModelShape) -> str | None:
    refusal = layout.refusal(resolved.config.precision)
    if refusal is not None:
        return refusal.reason
    chunks = count_chunks(layout.pipeline, layout.schedule)
    if chunks > len(shape.layers):
        return "more stages than layers"
    blocks = blocks_of_chunks(resolved.config.partition)
    if blocks is not None and len(blocks) != chunks:
        return f"partition {resolved.config.partition} has another number of stages"
    if blocks is not None and (sum(blocks) != len(shape.layers) - 2 or 0 in blocks[1:-1]):
        return f"partition {resolved.config.partition} does not match this model's {len(shape.layers) - 2} blocks"
    if layout.pipeline > 1 and shape.pipeline_refusal:
        return f"{shape.model_type} can't be split into stages"
    return None


def _most_stages(shape: ModelShape, hosts: tuple[Host, ...]) -> int:
    return min(len(shape.layers), sum(host.slots for host in hosts)) if shape.pipeline_refusal is None else 1


def _replicas(
    global_batch: int, pipeline: int, hosts: tuple[Host, ...], asked: int | None, shape: ModelShape
) -> int | None:
    """The largest number of replicas that can be; None where there is none."""
    most = sum(host.slots for host in hosts) // pipeline
    if shape.layerdrop:  # each replica would drop other layers
        most = min(most, 1)
    numbers: Sequence[int] = range(min(most, global_batch), 0, -1)
    if asked is not None:
        numbers = [asked] if asked <= most else []
    even = (n for n in numbers if global_batch % n == 0 and even_hosts(hosts, n * pipeline))
    return next(even, None)


def _micro_batches(share: int, asked: int | None) -> list[int]:
    """The sizes that divide a replica's share."""
    sizes = range(1, share + 1) if asked is None else (asked,)
    return [size for size in sizes if share % size == 0]


def _micro_batch_of(resolved: ResolvedConfig, hosts: tuple[Host, ...]) -> int:
    """The one that the config as it stands would take."""
    config = resolved.config
    replicas = config.data_parallel or max(1, sum(host.slots for host in hosts) // config.pipeline)
    return make_batch(
        global_batch=config.global_batch,
        micro_batch=fitting_micro_batch(resolved, replicas),
        data_parallel=replicas,
        pipeline=config.pipeline,
        seq_len=config.seq_len,
        where=str(resolved.origin("global_batch")),
    ).micro_batch
