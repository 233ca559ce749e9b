"""A world of ranks of which only one is there: collectives end at once, and others say what this one says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import partitioned_param_coordinator
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore

from dstrain import control_group, json_collectives
from dstrain.engine.pipeline_engine import DualPipeVStagedEngine
from dstrain.engine.pipeline_messages import Mailbox, Specs, TensorSpec
from dstrain.planning.schedules.table import Message
from dstrain.rehearsal.replacing import replace, replace_everywhere

Told = Callable[[str, int, str, int], None]
"""Takes the name of a collective of plain values, the bytes of this rank's, their device and the number of ranks."""


class FakeGroups:
    """The process groups: those of NCCL, and those that were asked for on gloo, which takes tensors of the host."""

    def __init__(self) -> None:
        self.on_host: set[str] = set()

    def takes(self, group: Any) -> str:
        """``cuda`` or ``cpu``."""
        return "cpu" if getattr(group, "group_name", "") in self.on_host else "cuda"


def join_fake_world(rank: int, ranks: int, told: Told) -> FakeGroups:
    """Initialise ``torch.distributed`` as this rank of so many.

    Args:
        told: of collectives of plain values, which are answered without tensors.
    """
    groups = FakeGroups()
    distributed.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    new_group = distributed.new_group

    def new_fake_group(*args: Any, backend: str | None = None, **kwargs: Any) -> Any:
        made = new_group(*args, **kwargs)
        if backend is not None and "gloo" in str(backend):
            groups.on_host.add(made.group_name)
        return made

    replace_everywhere(new_group, new_fake_group)
    # Real groups: NCCL on GPUs. Whoever asks chooses the device of a tensor by it.
    replace_everywhere(
        distributed.get_backend, lambda group=None: "gloo" if groups.takes(group) == "cpu" else "nccl"
    )
    _answer_for_others(groups, told)
    return groups


def _answer_for_others(groups: FakeGroups, told: Told) -> None:
    """All others say what this rank says: what is compared is equal, as it is in a run that goes well."""

    def gather_json(value: Any, group: Any = None) -> list[Any]:
        ranks = distributed.get_world_size(group)
        told("all_gather", len(str(value)), groups.takes(group) if group is not None else "cpu", ranks)
        return [value] * ranks

    def broadcast_json(value: Any, src: int = 0) -> Any:
        told("broadcast", len(str(value)), "cpu", distributed.get_world_size())
        return value

    def all_reduce_max(numbers: Sequence[int]) -> list[int]:
        told("all_reduce", 8 * len(numbers), "cpu", distributed.get_world_size())
        return list(numbers)

    replace_everywhere(control_group.all_reduce_max, all_reduce_max)
    replace_everywhere(json_collectives.all_gather_json, gather_json)
    replace_everywhere(json_collectives.broadcast_json, broadcast_json)
    # DeepSpeed compares numbers of this rank with those of others: received tensors hold none.
    replace(partitioned_param_coordinator, "assert_ints_same_as_other_ranks", lambda *args, **kwargs: None)
    replace(DeepSpeedEngine, "_checkpoint_tag_validation", lambda engine, tag: None)


Tensors = Sequence[tuple[Sequence[int], torch.dtype]]


def receive_from_neighbours(shapes: Tensors) -> None:
    """What the previous stage announces, in place of the numbers that a fake message does not hold.

    Args:
        shapes: of what passes from stage to stage for each micro-batch, with their types. All floats have gradients.
    """
    replace(Mailbox, "_receive_announcement", _announced(shapes))
    replace(DualPipeVStagedEngine, "_recv_tensor_meta", _announced_in_dualpipev(shapes))


def _announced(shapes: Tensors) -> Callable[[Mailbox, Message], Specs]:
    hidden, _, *sums = shapes  # positions are not sent

    def receive(mailbox: Mailbox, message: Message) -> Specs:
        return tuple(
            TensorSpec(tuple(shape), dtype, dtype.is_floating_point and torch.is_grad_enabled())
            for shape, dtype in (hidden, *sums)
        )

    return receive


def _announced_in_dualpipev(shapes: Tensors) -> Callable[[Any, int], tuple[torch.Tensor, ...]]:
    def receive(engine: Any, sender: int) -> tuple[torch.Tensor, ...]:
        from deepspeed.runtime.pipe import engine as pipe_engine
        from deepspeed.runtime.pipe import p2p

        announcement = torch.empty(pipe_engine.TENSOR_META_SIZE, dtype=torch.int32, device=engine.device)
        p2p.recv(announcement, sender)
        return tuple(
            engine._allocate_or_extend_buffers(place, shape, dtype)
            for place, (shape, dtype) in enumerate(shapes)
        )

    return receive
