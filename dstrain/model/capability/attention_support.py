"""Tests by trying which attention implementations a family has, and whether they compute the same."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PretrainedConfig

from dstrain.errors import DstrainError
from dstrain.model.capability.randomness import calm
from dstrain.model.capability.trial_model import small_trial, trial_model
from dstrain.model.document_masks import FLEX
from dstrain.model.skeleton import empty_model

UNEQUAL = 1e-4
"""Differences up to this share of the largest logit are rounding: sums in another order. Measured over 185 families: up
to 4.6e-6."""

ROWS, LENGTH = 2, 48
_FLASH = ("flash_attention_2", "flash_attention_3")


def attention_refusals(config: PretrainedConfig) -> dict[str, str]:
    """Why this model can't have an attention implementation, by its name; those that it can have are left out.

    Flash and flex attention are not run, which takes a GPU: the family says whether it has them.
    """
    try:
        small = calm(small_trial(config))
        usual = _logits(small, "auto")
        model = empty_model(small)
    except DstrainError:  # what does not run on a small copy is no news of this check
        return {}
    refused = {}
    for name in ("sdpa", "eager"):
        try:
            apart = float((_logits(small, name) - usual).abs().max() / usual.abs().max())
        except DstrainError as error:
            refused[name] = _without_family(error.message)
        else:
            if not apart <= UNEQUAL:
                refused[name] = f"it computes another result (logits differ by {apart:.0%})"
    absent = "transformers has none for this family"
    if not model._supports_flex_attn:
        refused[FLEX] = absent
    if not model._supports_flash_attn:
        refused.update(dict.fromkeys(_FLASH, absent))
    return refused


@torch.no_grad()
def _logits(config: PretrainedConfig, attention: str) -> Tensor:
    """Of random tokens. Raises DstrainError where it can't be built or does not run."""
    model = trial_model(config, attention)
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (ROWS, LENGTH), generator=random)
    try:
        logits: Tensor = model((ids, torch.arange(LENGTH).repeat(ROWS, 1)))
    except Exception as error:  # whatever the family's code runs into
        text = " ".join(str(error).split())[:200]
        raise DstrainError(f"it does not run ({type(error).__name__}: {text})") from error
    return logits


def _without_family(message: str) -> str:
    """What transformers says, behind what `empty_model` puts in front of it."""
    return message.partition(" cannot be built: ")[2] or message
