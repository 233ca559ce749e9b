"""A causal language model in one piece, for families that cannot be split into pipeline layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from dstrain.errors import DstrainError
from dstrain.model.anatomy import takes_positions
from dstrain.model.buffers import keep_buffer_types
from dstrain.model.initialise import cast, initialise, initialisers, materialise
from dstrain.model.skeleton import empty_model


class WholeModel(nn.Module):
    """(input_ids int64 [B, S], position_ids int64 [B, S]) -> logits [B, S, V], in one tuple argument.

    Parameters have their Hugging Face names and the initial values that ``LayeredModel`` gives them.

    Args:
        config, seed, dtype, attention: as for ``LayeredModel``.

    Raises:
        DstrainError: the model cannot be built, or is an encoder-decoder, or asks for a loss that is not
            logits'.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        *,
        seed: int,
        dtype: torch.dtype = torch.float32,
        attention: str = "sdpa",
    ) -> None:
        super().__init__()
        if getattr(config, "output_router_logits", False):
            raise DstrainError(
                "the router loss of the experts is not computed",
                hint="set output_router_logits: false in the model",
            )
        model = empty_model(config, attention)
        initialise_whole(model, seed)
        cast(model, dtype)
        self.config = model.config
        # The very dictionaries of the Hugging Face model: what is moved, cast or replaced here is so there.
        self._parameters, self._buffers, self._modules = model._parameters, model._buffers, model._modules
        self.__dict__["_model"] = model
        self._takes_positions = takes_positions(model)

    def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        input_ids, position_ids = inputs
        positions = {"position_ids": position_ids} if self._takes_positions else {}
        return self._model(input_ids=input_ids, use_cache=False, **positions).logits

    def train(self, mode: bool = True) -> WholeModel:
        super().train(mode)
        self._model.training = mode
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WholeModel:
        return keep_buffer_types(self, lambda: super(WholeModel, self)._apply(fn, recurse))


def initialise_whole(model: PreTrainedModel, seed: int) -> None:
    """Materialise and initialise all weights of ``model`` (parameters on meta) as its layers would be."""
    owners = initialisers(model)
    tied = set(getattr(model, "all_tied_weights_keys", {}).values())
    materialise(model)
    missed = initialise("", model, owners, seed)
    # A tied weight was just drawn once by each of its owners; the last word is the canonical one's.
    for path in sorted({key.rpartition(".")[0] for key in tied}):
        initialise(path, model.get_submodule(path), owners, seed)
    if missed:
        raise DstrainError(
            f"the {model.config.model_type} family defines no initial value for {missed[0]}",
            hint="use another model family",
        )
