"""Tests by trying which attention implementations a family has, and whether they compute the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig

from dstrain.errors import DstrainError
from dstrain.model.capability.independence import leak
from dstrain.model.capability.randomness import calm
from dstrain.model.capability.trial_model import small_trial, trial_model
from dstrain.model.document_masks import FLEX
from dstrain.model.skeleton import empty_model
from dstrain.model.varlen_attention import LARGEST_HEAD, VARLEN, varlen_attention

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
    absent = "transformers has none for this family"
    for name in ("sdpa", "eager", VARLEN):
        try:
            apart = float((_logits(small, name) - usual).abs().max() / usual.abs().max())
        except DstrainError as error:
            unknown = name == VARLEN and " cannot be built: " in error.message
            refused[name] = absent if unknown else _without_family(error.message)
        else:
            if not apart <= UNEQUAL:
                refused[name] = f"it computes another result (logits differ by {apart:.0%})"
    if VARLEN not in refused:
        reason = _varlen_refusal(config, small)
        refused |= {VARLEN: reason} if reason else {}
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
        found = leak(trial_model(small, VARLEN))
        types = set() if found else _types_of_varlen(small)
    except DstrainError as error:
        return f"packed rows could not be tried: {error.message}"
    other = next((str(each).removeprefix("torch.") for each in types - {torch.bfloat16}), None)
    return found or (
        f"a model in bf16 has its attention in {other}, which the kernel does not take" if other else None
    )


def _types_of_varlen(small: PretrainedConfig) -> set[torch.dtype]:
    """Of the states that attention is called with in a model in bf16. Raises DstrainError where it does not run."""
    types: set[torch.dtype] = set()

    def note(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        types.update((query.dtype, key.dtype, value.dtype))
        states = (state.to(torch.bfloat16) for state in (query, key, value))
        return varlen_attention(module, *states, *args, **kwargs)

    AttentionInterface.register(VARLEN, note)
    try:
        _logits(small, VARLEN, torch.bfloat16)
    finally:
        AttentionInterface.register(VARLEN, varlen_attention)
    return types


def _head_width(config: PretrainedConfig) -> int:
    """Elements of the widest head of queries, as far as the config names it."""
    values = config.get_text_config().to_dict()

    def value(name: str) -> int:
        return values[name] if isinstance(values.get(name), int) else 0

    shared = value("hidden_size") // max(1, value("num_attention_heads"))
    named = value("head_dim"), value("global_head_dim"), value("qk_nope_head_dim") + value("qk_rope_head_dim")
    return max(named) or shared


@torch.no_grad()
def _logits(config: PretrainedConfig, attention: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of random tokens. Raises DstrainError where it can't be built or does not run."""
    model = trial_model(config, attention).to(dtype)
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
