"""Small models with weights that tell, to try what a family computes."""

from __future__ import annotations

import math

import torch
from transformers import PretrainedConfig

from dstrain.errors import DstrainError
from dstrain.model.adapters import Adapters
from dstrain.model.architecture import canonical_config
from dstrain.model.capability.small_model import small_config
from dstrain.model.skeleton import empty_model
from dstrain.model.unsplit_model import UnsplitModel

SHORT = {
    "attention_chunk_size": 4,
    "block_size": 4,
    "index_block_size": 4,
    "index_topk_blocks": 2,
    "local_attention": 8,
    # Sparse attention takes the keys of the highest score. Few heads often agree on 0 for several keys, and then it
    # is their place in the row that decides; many heads do not.
    "index_n_heads": 32,
    "indexer_n_heads": 32,
}
"""What a small model has otherwise here, so that rows this short show what it does in long ones."""

VOCABULARY = 256


LARGEST = 300_000_000
"""Parameters up to which a model is tried where no small copy of it can be made: 1.2 GB."""


@torch.no_grad()
def trial_model(
    config: PretrainedConfig, attention: str = "auto", adapters: Adapters | None = None
) -> UnsplitModel:
    """A model whose every weight tells: initial values are small, and gates often 0."""
    model = UnsplitModel(config, seed=0, attention=attention, adapters=adapters).eval()
    random = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=random)
        if parameter.dim() > 1:
            parameter.copy_(noise / math.sqrt(parameter.shape[-1]))
        else:
            parameter.add_(0.1 * noise)
    return model


def small_trial(config: PretrainedConfig) -> PretrainedConfig:
    """A copy that is cheap to run, and shows in short rows what the model does in long ones.

    Raises:
        DstrainError: there is none.
    """
    try:
        small = small_config(config)
    except DstrainError:
        small = shallow(config)
        if sum(parameter.numel() for parameter in empty_model(small).parameters()) > LARGEST:
            raise
    for name, value in SHORT.items():
        if isinstance(getattr(small, name, None), int):
            setattr(small, name, value)
    return small


def shallow(config: PretrainedConfig) -> PretrainedConfig:
    """A copy of ``config`` with a small vocabulary and as few blocks as show each kind of its blocks.

    Its width stays.
    """
    config = canonical_config(config)
    config.vocab_size = min(config.vocab_size, VOCABULARY)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        token = getattr(config, name, None)
        if isinstance(token, int) and token >= config.vocab_size:
            setattr(config, name, 0)
    kinds = getattr(config, "layer_types", None)
    depth = 2 if not kinds else 1 + max(kinds.index(kind) for kind in set(kinds))
    if depth < config.num_hidden_layers:
        config.num_hidden_layers = depth
        for name, value in list(vars(config).items()):
            if name.endswith("layer_types") and isinstance(value, list):
                setattr(config, name, value[:depth])
    return config
