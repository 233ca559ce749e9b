"""Bytes that a rank really sends: torch's collectives and messages, wrapped while a step is trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch

from tests.support.distributed.training import Case, build_case_engine, make_case_plan, samples

Sent = Counter[tuple[str, str]]
"""Bytes by (operation, type of the elements)."""


class Counting:
    """Wraps torch.distributed's functions from now on in this process; `sent` has what was sent since `start`.

    A collective's bytes are those that a ring sends from one rank: (n - 1) / n of the whole tensor for a reduction, a
    gathering and a scattering, twice that for an all-reduce.
    """

    def __init__(self) -> None:
        self.sent: Sent = Counter()
        self._depth = 0
        for name, whole in _WHOLE.items():
            self._wrap(name, whole)
        self._wrap_messages()

    def start(self) -> None:
        self.sent = Counter()

    def _wrap(self, name: str, whole: Callable[..., Sequence[torch.Tensor]]) -> None:
        original = getattr(torch.distributed, name)

        @wraps(original)
        def counted(*args: Any, **kwargs: Any) -> Any:
            self._depth += 1
            try:
                outcome = original(*args, **kwargs)
            finally:
                self._depth -= 1
            if not self._depth:
                ranks = torch.distributed.get_world_size(_group(args, kwargs))
                for tensor in whole(*args, **kwargs):
                    share = (2 if name == "all_reduce" else 1) * (ranks - 1) / ranks
                    self._add(name, tensor, share)
            return outcome

        setattr(torch.distributed, name, counted)

    def _wrap_messages(self) -> None:
        """``isend`` itself stays: torch compares it by identity in a batch."""
        send, batch = torch.distributed.send, torch.distributed.batch_isend_irecv

        def counted_send(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self._add("send", tensor, 1.0)
            return send(tensor, *args, **kwargs)

        def counted_batch(operations: list[Any]) -> Any:
            for operation in operations:
                if operation.op is torch.distributed.isend:
                    self._add("send", operation.tensor, 1.0)
            return batch(operations)

        torch.distributed.send = counted_send
        torch.distributed.batch_isend_irecv = counted_batch

    def _add(self, name: str, tensor: torch.Tensor, share: float) -> None:
        size = tensor.numel() * tensor.element_size()
        self.sent[name, str(tensor.dtype).removeprefix("torch.")] += size * share  # type: ignore[assignment]


def _group(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    found = [*args, *kwargs.values()]
    return next((one for one in found if isinstance(one, torch.distributed.ProcessGroup)), None)


# The tensors that go round whole, of each function's arguments.
_WHOLE: dict[str, Callable[..., Sequence[torch.Tensor]]] = {
    "all_reduce": lambda tensor, *args, **kwargs: [tensor],
    "reduce": lambda tensor, *args, **kwargs: [tensor],
    "broadcast": lambda tensor, *args, **kwargs: [tensor],
    "all_gather_into_tensor": lambda output_tensor, *args, **kwargs: [output_tensor],
    "all_gather": lambda tensor_list, *args, **kwargs: tensor_list,
    "reduce_scatter_tensor": lambda output, input, *args, **kwargs: [input],
    "reduce_scatter": lambda output, input_list, *args, **kwargs: input_list,
}


def bytes_of_a_step(rank: int, case: Case, zero_keys: dict[str, Any]) -> Sent:
    """What this rank sends in the second step of a case, with other values of some ``zero_optimization`` keys."""
    from dstrain.engine.interface import MicroBatch

    counting = Counting()
    plan = make_case_plan(case)
    plan.deepspeed["zero_optimization"].update(zero_keys)
    engine, plan = build_case_engine(case, plan)
    replica = plan.layout.replica(rank)
    for step in (1, 2):
        ids, positions, labels = samples(step)
        parts = []
        for index in range(case.accumulation):
            start = (index * case.data_parallel + replica) * case.micro_batch
            rows = slice(start, start + case.micro_batch)
            parts.append(MicroBatch(ids[rows], positions[rows], labels[rows], torch.tensor([1.0])))
        counting.start()
        engine.train_batch(parts, case.lr)
    return counting.sent
