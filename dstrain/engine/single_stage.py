"""All layers of a model in one process: the same layers as a pipeline's, called in order."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dstrain.engine.recompute import recompute
from dstrain.model.head_output import HeadOutputRequest
from dstrain.model.layers import BlockLayer
from dstrain.model.pipeline_model import PipelineModel


class SingleStageModel(nn.Module):
    """``(input_ids, position_ids)`` [B, S] -> what the head is asked for. Parameters are named as in a pipeline.

    Args:
        activation_checkpointing: recompute each block in the backward pass (not the embedding and
            the head), non-reentrantly: a reentrant checkpoint around the embedding would cut its
            gradient off.
    """

    def __init__(self, model: PipelineModel, *, activation_checkpointing: bool) -> None:
        super().__init__()
        for index in range(model.num_layers):
            self.add_module(str(index), model.build(index))
        self.activation_checkpointing = activation_checkpointing

    @property
    def head(self) -> HeadOutputRequest:
        last = self._modules[str(len(self._modules) - 1)]
        assert isinstance(last, HeadOutputRequest)
        return last

    def forward(self, inputs: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        state: Any = inputs
        for layer in self.children():
            if self.activation_checkpointing and self.training and isinstance(layer, BlockLayer):
                state = recompute(layer, state)
            else:
                state = layer(state)
        output: torch.Tensor = state
        return output
