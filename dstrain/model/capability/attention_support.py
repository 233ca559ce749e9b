"""Tests by trying which attention implementations a family has, and whether they compute the same."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PretrainedConfig

from dstrain.errors import DstrainError
from dstrain.model.capability.independence import leak
from dstrain.model.capability.randomness import calm
from dstrain.model.capability.trial_model import small_trial, trial_model
from dstrain.model.document_masks import FLEX
from dstrain.model.skeleton import empty_model
from dstrain.model.varlen_attention import LARGEST_HEAD, VARLEN

UNEQUAL = 1e-4
"""Differences up to this share of the largest logit are rounding: sums in another order. Measured over 185 families: up
to 4.6e-6."""

ROWS, LENGTH = 2, 48
_FLASH = ("flash_attention_2", "flash_attention_3")


def attention_refusals(config: PretrainedConfig) -> dict[str, str]:
    """Why this model can't have an attention implementation, by its name; those that it can have are left out.

    Flash and flex attention are not run, which takes a GPU: the family says whether it has them. Varlen attention is
    run as it is computed on CPUs, with several documents in a row.
    """
    try:
        small = calm(small_trial(config))
        usual = _logits(small, "auto")
        model = empty_model(small)
    except DstrainError:  # what does not run on a small copy is no news of this check
        return {VARLEN: "it could not be tried on a small copy of the model"}
    refused = {}
    for name in ("sdpa", "eager", VARLEN):
        try:
            apart = float((_logits(small, name) - usual).abs().max() / usual.abs().max())
        except DstrainError as error:
            refused[name] = _without_family(error.message)
        else:
            if not apart <= UNEQUAL:
                refused[name] = f"it computes another result (logits differ by {apart:.0%})"
    if VARLEN not in refused:
        reason = _varlen_refusal(config, small)
        refused |= {VARLEN: reason} if reason else {}
    absent = "transformers has none for this family"
    if not model._supports_flex_attn:
        refused[FLEX] = absent
    if not model._supports_flash_attn:
        refused.update(dict.fromkeys(_FLASH, absent))
    return refused


def _varlen_refusal(config: PretrainedConfig, small: PretrainedConfig) -> str | None:
    """What is wrong beside the result of whole rows, in one sentence, or None."""
    width = _head_width(config)
    if width > LARGEST_HEAD:
        return f"its heads have {width} elements, and the kernel takes {LARGEST_HEAD}"
    try:
        return leak(trial_model(small, VARLEN))
    except DstrainError as error:
        return f"packed rows could not be tried: {error.message}"


def _head_width(config: PretrainedConfig) -> int:
    """Elements of the widest head of queries, as far as the config names it."""
    values = config.get_text_config().to_dict()

    def value(name: str) -> int:
        return values[name] if isinstance(values.get(name), int) else 0

    shared = value("hidden_size") // max(1, value("num_attention_heads"))
    named = value("head_dim"), value("global_head_dim"), value("qk_nope_head_dim") + value("qk_rope_head_dim")
    return max(named) or shared


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
