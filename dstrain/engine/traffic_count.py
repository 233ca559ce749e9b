"""Bytes that this rank sends: torch's collectives and messages, counted while a step is trained.

A collective's bytes are those that a ring sends from one rank: (n - 1) / n of the whole tensor for a reduction, a
gathering and a scattering, twice that for an all-reduce.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import distributed

from dstrain.control_group import all_reduce_max
from dstrain.engine.pipeline_messages import Mailbox, PostedTensor
from dstrain.planning.schedules.table import Message

Sent = Counter[tuple[str, str]]
"""Bytes by (operation, type of the elements); messages are ``send``."""


class TrafficCount:
    """Wraps torch.distributed's functions from now on in this process, which else stay as they are.

    It is made before the ranks meet, since DeepSpeed keeps some of the functions then.
    """

    def __init__(self) -> None:
        self.sent: Sent = Counter()
        self._counts = False
        self._depth = 0
        for name, whole in _WHOLE.items():
            self._wrap(name, whole)
        self._wrap_messages()

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what is sent inside, from 0 on."""
        self.sent, self._counts = Counter(), True
        try:
            yield
        finally:
            self._counts = False

    def largest(self) -> dict[str, int]:
        """Bytes in collectives, and in messages to other stages, each of the rank that sent most. Collective."""
        messages = sum(size for (name, _), size in self.sent.items() if name == "send")
        both = [sum(self.sent.values()) - messages, messages]
        most = all_reduce_max([round(size) for size in both])
        return dict(zip(("traffic_replicas", "traffic_stages"), most, strict=True))

    def _wrap(self, name: str, whole: Callable[..., Sequence[torch.Tensor]]) -> None:
        original = getattr(distributed, name)

        @wraps(original)
        def counted(*args: Any, **kwargs: Any) -> Any:
            if not self._counts:
                return original(*args, **kwargs)
            self._depth += 1
            try:
                outcome = original(*args, **kwargs)
            finally:
                self._depth -= 1
            if not self._depth:
                ranks = distributed.get_world_size(_group(args, kwargs))
                for tensor in whole(*args, **kwargs):
                    self._add(name, tensor, (2 if name == "all_reduce" else 1) * (ranks - 1) / ranks)
            return outcome

        setattr(distributed, name, counted)

    def _wrap_messages(self) -> None:
        """``isend`` itself stays: torch compares it by identity in a batch."""
        send, post, batch = distributed.send, Mailbox.post_send, distributed.batch_isend_irecv

        @wraps(send)
        def counted_send(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._counts:
                self._add("send", tensor, 1.0)
            return send(tensor, *args, **kwargs)

        @wraps(post)
        def counted_post(mailbox: Mailbox, message: Message, tensor: torch.Tensor) -> PostedTensor:
            if self._counts:
                self._add("send", tensor, 1.0)
            return post(mailbox, message, tensor)

        @wraps(batch)
        def counted_batch(p2p_op_list: list[distributed.P2POp]) -> list[distributed.Work]:
            for operation in p2p_op_list if self._counts else ():
                if operation.op is distributed.isend:
                    self._add("send", operation.tensor, 1.0)
            return batch(p2p_op_list)

        distributed.send = counted_send
        Mailbox.post_send = counted_post  # type: ignore[method-assign,assignment]
        distributed.batch_isend_irecv = counted_batch

    def _add(self, name: str, tensor: torch.Tensor, share: float) -> None:
        size = tensor.numel() * tensor.element_size()
        self.sent[name, str(tensor.dtype).removeprefix("torch.")] += size * share  # type: ignore[assignment]


def _group(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    found = [*args, *kwargs.values()]
    return next((one for one in found if isinstance(one, distributed.ProcessGroup)), None)


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
