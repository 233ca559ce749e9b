"""Tests whether a model's head treats each token separately, so that its loss can be computed in chunks."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig

from dstrain.errors import DstrainError
from dstrain.model.capability.small_model import small_config
from dstrain.model.pipeline_model import PipelineModel

LENGTH = 12
CUT = 5


@torch.no_grad()
def head_is_tokenwise(config: PretrainedConfig) -> bool:
    """Compare the logits of a row with those of its two parts, on a small copy of the model.

    False too where the model has no head of its own (it can't be split), or no small copy.
    """
    try:
        model = PipelineModel(small_config(config), seed=0, attention="auto")
        head = model.build(model.num_layers - 1).eval()
    except DstrainError:
        return False
    hidden = torch.randn(1, LENGTH, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(LENGTH)[None]
    whole = head((hidden, positions))
    cut = [head((hidden[:, part], positions[:, part])) for part in (slice(CUT), slice(CUT, LENGTH))]
    return bool(torch.allclose(whole, torch.cat(cut, dim=1), rtol=1e-4, atol=1e-5))
