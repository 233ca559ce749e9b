"""Pipeline layers: each runs its part of a Hugging Face model's own forward."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dstrain.model.adapter_dropout import DropoutOfParts, dropping_by_rows
from dstrain.model.head_output import HeadOutputRequest
from dstrain.model.pipeline_split.partial_forward import Call, PartialForward
from dstrain.model.router import RouterLogitsRecorder, RouterLoss
from dstrain.model.skeleton import keep_buffer_types, put_at_paths

State = tuple[Tensor, ...]
"""What one layer hands to the next: (hidden [B, S, H], position_ids int64 [B, S]), and with a router loss its sums
(float32 [experts], int64 [experts])."""


class Layer(nn.Module):
    """Holds modules at their Hugging Face names, and keeps the precision of their buffers.

    ``forward`` takes one tuple, as DeepSpeed's ``PipelineModule`` calls its layers.
    """

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        super().__init__()
        put_at_paths(self, modules)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Layer:
        apply: Callable[..., Layer] = super()._apply
        return keep_buffer_types(self, lambda: apply(fn, recurse))


class EmbedLayer(Layer):
    """(input_ids int64 [B, S], position_ids int64 [B, S]) -> State."""

    def __init__(
        self, modules: dict[str, nn.Module], partial_forward: PartialForward, router: RouterLoss | None
    ) -> None:
        super().__init__(modules)
        self._partial_forward = partial_forward
        self._router = router

    def forward(self, inputs: tuple[Tensor, Tensor]) -> State:
        input_ids, position_ids = inputs
        with dropping_by_rows(position_ids):
            hidden = self._partial_forward.prologue(input_ids, position_ids, training=self.training)
        sums = self._router.start(hidden.device) if self._router else ()
        return hidden, position_ids, *sums


class BlockLayer(Layer):
    """State -> State."""

    _block: nn.Module

    def __init__(
        self, modules: dict[str, nn.Module], number: int, arguments: ArgumentsCache, router: RouterLoss | None
    ) -> None:
        super().__init__(modules)
        # Past nn.Module.__setattr__, which would register the block under a second name.
        [(path, self.__dict__["_block"])] = modules.items()
        self._number = number
        self._arguments = arguments
        self._router = router
        self._router_logits = RouterLogitsRecorder(router, path, self._block) if router else None

    def forward(self, state: State) -> State:
        hidden, position_ids, *sums = state
        call = self._arguments(hidden, position_ids)[self._number]
        if self._router is None or self._router_logits is None:
            with dropping_by_rows(position_ids):
                return _hidden_of(call.apply(self._block, hidden)), position_ids
        with self._router_logits.capture() as logits, dropping_by_rows(position_ids):
            output = call.apply(self._block, hidden)
        return _hidden_of(output), position_ids, *self._router.add((sums[0], sums[1]), logits)


def _hidden_of(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple | list) else output
    return hidden


class HeadLayer(HeadOutputRequest, Layer):
    """State -> logits [B, S, V], or what it is asked for.

    The loss is the sum of the tokens' losses times the weight, and in training the router loss.
    """

    def __init__(
        self, modules: dict[str, nn.Module], partial_forward: PartialForward, router: RouterLoss | None
    ) -> None:
        super().__init__(modules)
        self._partial_forward = partial_forward
        self._router = router

    def forward(self, state: State) -> Tensor:
        hidden, position_ids, *sums = state
        if self.target is not None:
            with dropping_by_rows(position_ids):
                loss = self._token_loss(hidden, position_ids, *self.target)
            return loss + self._router.loss((sums[0], sums[1])) if self._router and self.training else loss
        if self.position is not None:
            row, place = self.position
            one = slice(row, row + 1), slice(place, place + 1)
            return self._logits(hidden[one], position_ids[one])[0, 0]
        return self._logits(hidden, position_ids)

    def _logits(self, hidden: Tensor, position_ids: Tensor) -> Tensor:
        return self._partial_forward.epilogue(hidden, position_ids, training=self.training)

    def _token_loss(self, hidden: Tensor, position_ids: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
        """In chunks of tokens: a chunk's logits live only while its loss, or its gradient, is computed.

        Each chunk runs the family's own epilogue, with its scaling and soft-capping.
        """
        if not 0 < self.loss_chunk < labels.numel():
            return self.loss_of(self._logits(hidden, position_ids), (labels, weight))

        dropout = DropoutOfParts(position_ids)

        def part(first: int, hidden: Tensor, position_ids: Tensor, labels: Tensor) -> Tensor:
            with dropout.given(first, labels.numel()):
                return self.loss_of(self._logits(hidden, position_ids), (labels, weight))

        rows = (tensor.flatten(0, 1).split(self.loss_chunk) for tensor in (hidden, position_ids, labels))
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for number, chunk in enumerate(zip(*rows, strict=True)):
            inputs = (tensor[None] for tensor in chunk)
            total = total + checkpoint(part, number * self.loss_chunk, *inputs, use_reentrant=False)
        return total


class ArgumentsCache:
    """The blocks' arguments for the last position tensors: a stage computes them once a micro-batch.

    Keyed by the tensor's storage and version; an entry keeps that tensor alive, since a freed storage is
    reused at the same address. Two entries serve a stage that runs one forward and one recomputation
    alternately; more would keep more attention masks ([B, 1, S, S]). A receive that writes into a buffer
    behind autograd's back does not bump the version: hand the layers a clone, as DeepSpeed's engine does.
    """

    SIZE = 2

    def __init__(self, partial_forward: PartialForward) -> None:
        self._partial_forward = partial_forward
        self._entries: OrderedDict[tuple[Any, ...], tuple[Tensor, list[Call]]] = OrderedDict()

    def __call__(self, hidden: Tensor, position_ids: Tensor) -> list[Call]:
        # Inference tensors have no version and may not be saved for a later backward; meta ones have no
        # address.
        if torch.is_inference_mode_enabled() or position_ids.is_inference() or position_ids.is_meta:
            return self._partial_forward.arguments(hidden, position_ids)
        key = (
            position_ids.untyped_storage().data_ptr(),
            position_ids.storage_offset(),
            position_ids.shape,
            position_ids.stride(),
            position_ids.dtype,
            position_ids.device,
            position_ids._version,
            torch.is_autocast_enabled(position_ids.device.type),
            hidden.dtype,
            hidden.shape,
        )
        if key in self._entries:
            self._entries.move_to_end(key)
        else:
            self._entries[key] = (position_ids, self._partial_forward.arguments(hidden, position_ids))
            while len(self._entries) > self.SIZE:
                self._entries.popitem(last=False)
        return self._entries[key][1]
