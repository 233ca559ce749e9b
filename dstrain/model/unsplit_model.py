"""A causal language model as a single layer, for families that can't be split into pipeline layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from dstrain.errors import DstrainError
from dstrain.model.adapter_dropout import dropping_by_rows
from dstrain.model.adapters import Adapters
from dstrain.model.document_masks import Documents
from dstrain.model.head_output import HeadOutputRequest
from dstrain.model.model_parts import values_of
from dstrain.model.pipeline_split.structure import takes_positions
from dstrain.model.router import router_coefficient
from dstrain.model.skeleton import empty_model, keep_buffer_types
from dstrain.model.weights.pretrained import PretrainedWeights
from dstrain.model.weights.quantized_weights import QuantizedWeights


class UnsplitModel(HeadOutputRequest, nn.Module):
    """(input_ids int64 [B, S], position_ids int64 [B, S]) -> logits [B, S, V], in one tuple argument, or what it is
    asked for.

    Parameters have their Hugging Face names and the initial values that ``PipelineModel`` gives them.

    Args:
        config, seed, dtype, attention, weights, adapters: as for ``PipelineModel``.
        after_build: called with each block as soon as its parameters have their values, and at the end with the
            whole model, for the others.

    Raises:
        DstrainError: the model cannot be built, or is an encoder-decoder, or asks for a loss that is not
            logits'.
    """

    _model: PreTrainedModel

    def __init__(
        self,
        config: PretrainedConfig,
        *,
        seed: int,
        dtype: torch.dtype = torch.float32,
        attention: str = "sdpa",
        weights: PretrainedWeights | None = None,
        adapters: Adapters | None = None,
        after_build: Callable[[nn.Module], None] = lambda module: None,
    ) -> None:
        super().__init__()
        model = empty_model(config, attention)
        values = values_of(model, seed, dtype, weights)
        finish = _Finish(model, adapters, after_build, values.quantized)
        for path, block in values.blocks.items():
            values.fill_block(path)
            finish.block(path, block)
        values.fill_rest()
        finish.rest()
        self.config = model.config
        # The very dictionaries of the Hugging Face model: what is moved, cast or replaced here is so there.
        self._parameters, self._buffers, self._modules = model._parameters, model._buffers, model._modules
        self.__dict__["_model"] = model
        self._takes_positions = takes_positions(model)
        self._documents = Documents(model)
        asked_for = getattr(config, "output_router_logits", False)
        self._router_coefficient = router_coefficient(model) if asked_for else None

    @property
    def supports_flash_attention(self) -> bool:
        """Whether the family has flash attention in transformers."""
        return bool(self._model._supports_flash_attn)

    def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        input_ids, position_ids = inputs
        self._position_ids = position_ids
        options: dict[str, Any] = {"position_ids": position_ids} if self._takes_positions else {}
        routed = self._router_coefficient is not None and self.target is not None and self.training
        if routed:
            options["output_router_logits"] = True
        with self._documents.apart(position_ids) as lengths, dropping_by_rows(position_ids):
            output = self._model(input_ids=input_ids, use_cache=False, **options, **lengths)
        logits: Tensor = output.logits
        if self.target is None:
            return logits if self.position is None else logits[self.position]
        loss = self.loss_of(logits, self.target)
        added = output.aux_loss if routed else None  # None too where the model has no experts after all
        return loss if added is None else loss + self._router_coefficient * added

    def recompute_blocks(self) -> None:
        """Forget each block's activations in training, and compute them again in the backward pass.

        Raises:
            DstrainError: the family's code can't.
        """
        model = self._model
        blocks = any(isinstance(module, GradientCheckpointingLayer) for module in model.modules())
        if not model.supports_gradient_checkpointing or not blocks:
            raise DstrainError(
                f"transformers can't recompute the activations of {model.config.model_type}",
                hint="--no-activation-checkpointing",
            )
        enable = getattr(model, "activation_checkpointing_enable", None)  # its name from transformers 5.23 on
        enable = enable or model.gradient_checkpointing_enable
        enable({"use_reentrant": False, "context_fn": self._contexts_of_recomputation})
        # Only the reentrant form needs inputs with a gradient; a frozen embedding shall have none.
        model.disable_input_require_grads()

    def _contexts_of_recomputation(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """A block that makes its own mask keeps documents apart in the second forward pass too, and drops the same."""
        return nullcontext(), self._again(self._position_ids)

    @contextmanager
    def _again(self, position_ids: Tensor) -> Iterator[None]:
        with self._documents.apart(position_ids), dropping_by_rows(position_ids):
            yield

    def train(self, mode: bool = True) -> UnsplitModel:
        super().train(mode)
        self._model.training = mode
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> UnsplitModel:
        apply: Callable[..., UnsplitModel] = super()._apply
        return keep_buffer_types(self, lambda: apply(fn, recurse))


class _Finish:
    """What is done with each block of a model as soon as its parameters have their values, and at last with all."""

    def __init__(
        self,
        model: PreTrainedModel,
        adapters: Adapters | None,
        after_build: Callable[[nn.Module], None],
        stored: QuantizedWeights | None = None,
    ) -> None:
        self._model = model
        self._stored = stored
        self._adapters = adapters
        self._after_build = after_build
        self._done: list[str] = []

    def block(self, path: str, block: nn.Module) -> None:
        if self._adapters is not None:
            self._adapters.add({path: block}, stored=self._stored)
            self._done.append(path)
        self._after_build(block)

    def rest(self) -> None:
        if self._adapters is not None:
            self._adapters.add_to_model(self._model, without=self._done, stored=self._stored)
        self._after_build(self._model)
