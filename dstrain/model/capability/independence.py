"""Tests what a family computes independently: packed documents, rows of a micro-batch, tokens at the head."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.masking_utils import flash_attention_mask

from dstrain.errors import DstrainError
from dstrain.model.capability.randomness import calm, is_random
from dstrain.model.capability.small_model import small_config
from dstrain.model.capability.trial_model import small_trial, trial_model
from dstrain.model.document_lengths import document_lengths
from dstrain.model.pipeline_model import PipelineModel
from dstrain.model.unsplit_model import UnsplitModel

LENGTHS = 20, 15, 13
"""Tokens of the documents in a test row: more than a small model's window or block, fewer than its positions."""

SHORTER = 12, 12, 12, 12
"""Those of a row beside it, in which every document is short."""

THRESHOLD = 16
"""Positions from which on a small model's rotary tables are others, where they depend on the length: between these."""

ROWS = 2
UNEQUAL = 1e-5
"""Differences up to this share of the largest logit are rounding: sums over rows of another length. Measured over 161
families: up to 2.7e-6 where documents are apart, 5e-2 and more where they are not."""

BY_DOCUMENT = "flash_attention_by_document"
"""The attention implementation of this module, as transformers knows it."""


@dataclass(frozen=True)
class Packing:
    """What a family makes of packed rows, each in one sentence, or None where all is right.

    Attributes:
        leak: with sdpa and eager, which get the same masks.
        flash_leak: with flash attention, which gets lengths instead of masks.
        looks_ahead: a token sees those after it, packed or not: such a model can't be trained to predict them.
        row_leak: a row's result depends on the other rows of its micro-batch, or on those of micro-batches before.
    """

    leak: str | None
    flash_leak: str | None
    looks_ahead: str | None
    row_leak: str | None


def judge_packing(config: PretrainedConfig) -> Packing:
    """Try packed rows on a small copy of the model, on CPU in fp32, in a fraction of a second.

    What can't be tried counts as a leak, with the reason.
    """
    try:
        small, model = _model_to_try(config)
        documents, looks_ahead, row_leak = leak(model), _looks_ahead(model), _row_leak(small, model)
    except DstrainError as error:
        untried = f"packed rows of a {config.model_type} model could not be tried: {error.message}"
        return Packing(untried, untried, None, None)
    return Packing(documents, _flash_leak(model), looks_ahead, row_leak)


def _model_to_try(config: PretrainedConfig) -> tuple[PretrainedConfig, UnsplitModel]:
    """A small model in training mode, if that draws no random numbers; else as it is evaluated. And its config, from
    which it can be built anew: that of its text part alone need not have a model.

    Raises:
        DstrainError: there is none, or it does not run.
    """
    small = calm(small_trial(config))
    chosen = _with_threshold(small)
    try:
        model = trial_model(chosen)
        _logits(model, _tokens(model, seed=0), _positions(LENGTHS))
    except DstrainError:  # learned positions end where rotary ones change
        chosen, model = small, trial_model(small)
    model.train()
    return chosen, model.eval() if is_random(model) else model


def packing_leaks(config: PretrainedConfig, attention: str = "auto") -> str | None:
    """What is wrong with packed rows of this model, in one sentence, or None.

    Args:
        attention: as the run config names it; those that begin with ``flash`` are tried with a stand-in in plain torch
            that takes the same arguments.
    """
    packing = judge_packing(config)
    return packing.flash_leak if attention.startswith("flash") else packing.leak


def leak(model: UnsplitModel) -> str | None:
    """Change the first document and see whether the others move; and compare each with itself alone in a row.

    Raises:
        DstrainError: the family's code does not run.
    """
    family = model.config.model_type
    one = _tokens(model, seed=0)
    other = one.clone()
    other[:, : LENGTHS[0]] = _tokens(model, seed=1)[:, : LENGTHS[0]]
    positions = _positions(LENGTHS)
    packed = _logits(model, one, positions)
    moved = _distance(packed[:, LENGTHS[0] :], _logits(model, other, positions)[:, LENGTHS[0] :])
    if not moved <= UNEQUAL:
        return f"{family} lets a document see the ones before it in a packed row (logits move by {moved:.0%})"
    cuts = one.split(LENGTHS, dim=1), positions.split(LENGTHS, dim=1)
    alone = torch.cat([_logits(model, ids, places) for ids, places in zip(*cuts, strict=True)], dim=1)
    apart = _distance(packed, alone)
    if not apart <= UNEQUAL:
        return (
            f"{family} computes another result for a document in a packed row than for the same document alone"
            f" (logits differ by {apart:.0%}): its positions do not restart, or it looks at the longest document"
        )
    return None


def _row_leak(config: PretrainedConfig, model: UnsplitModel) -> str | None:
    """Compare two rows of a micro-batch, of long and of short documents, with each of them in one of its own.

    Args:
        config: what ``model`` was built from.

    Raises:
        DstrainError: the family's code does not run.
    """
    ids = _tokens(model, seed=0)
    positions = torch.cat([_positions(SHORTER)[:1], _positions(LENGTHS)[:1]])

    def alone(model: UnsplitModel) -> Tensor:
        return torch.cat(
            [_logits(model, ids[row : row + 1], positions[row : row + 1]) for row in range(ROWS)]
        )

    first = alone(trial_model(config).train(model.training))
    after = _distance(first, alone(model))
    if not after <= UNEQUAL:
        return (
            f"{model.config.model_type} computes another result for a sample after other ones than at first"
            f" (logits differ by {after:.0%})"
        )
    apart = _distance(first, _logits(model, ids, positions))
    if not apart <= UNEQUAL:
        return (
            f"{model.config.model_type} computes another result for a sample beside another one in a micro-batch"
            f" than for the same sample alone (logits differ by {apart:.0%})"
        )
    return None


def _flash_leak(model: UnsplitModel) -> str | None:
    if not model.supports_flash_attention:
        return f"{model.config.model_type} has no flash attention in transformers"
    try:
        found = leak(_with_flash(model))
    except (DstrainError, ValueError) as error:  # a configuration may refuse flash attention by a ValueError
        return f"packed rows of {model.config.model_type} could not be tried with flash attention: {error}"
    return found and f"{found} with flash attention, which is not told where documents begin"


def _looks_ahead(model: UnsplitModel) -> str | None:
    one = _tokens(model, seed=0)
    other = one.clone()
    other[:, LENGTHS[0] :] = _tokens(model, seed=1)[:, LENGTHS[0] :]
    positions = torch.arange(sum(LENGTHS)).repeat(ROWS, 1)
    first, changed, again = (_logits(model, ids, positions)[:, : LENGTHS[0]] for ids in (one, other, one))
    moved = _distance(first, changed)
    if moved <= UNEQUAL or not torch.equal(first, again):  # logits that move by themselves tell nothing
        return None
    return f"{model.config.model_type} lets a token see the ones after it (logits move by {moved:.0%})"


def _positions(lengths: tuple[int, ...]) -> Tensor:
    return torch.cat([torch.arange(length) for length in lengths]).repeat(ROWS, 1)


def _tokens(model: UnsplitModel, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(3, model.config.vocab_size, (ROWS, sum(LENGTHS)), generator=random)


@torch.no_grad()
def _logits(model: UnsplitModel, ids: Tensor, positions: Tensor) -> Tensor:
    try:
        logits: Tensor = model((ids, positions))
        return logits
    except Exception as error:  # whatever the family's code runs into
        text = " ".join(str(error).split())[:200]
        raise DstrainError(f"it does not run ({type(error).__name__}: {text})") from error


def _distance(one: Tensor, other: Tensor) -> float:
    """The largest difference as a share of the largest value; not a number where one of them is none."""
    return float((one - other).abs().max() / one.abs().max())


def _with_threshold(config: PretrainedConfig) -> PretrainedConfig:
    """A copy in which rotary tables that depend on the length of what is computed change at `THRESHOLD`."""
    low = copy.deepcopy(config)
    names = ["original_max_position_embeddings"]
    parameters = getattr(low, "rope_parameters", None) or {}
    kinds = [values for values in (parameters, *parameters.values()) if isinstance(values, dict)]
    if any("dynamic" in str(values.get("rope_type")) for values in kinds):
        names.append("max_position_embeddings")
    for name in names:
        if isinstance(getattr(low, name, None), int):
            setattr(low, name, THRESHOLD)
        for values in kinds:
            if isinstance(values.get(name), int):
                values[name] = THRESHOLD
    return low


# A stand-in for flash attention


def _with_flash(model: UnsplitModel) -> UnsplitModel:
    """The same model, computing its attention by document."""
    _register()
    # Past `set_attn_implementation`, which would look for kernels where a family lists those that fit it.
    model.config._attn_implementation = BY_DOCUMENT
    return model


def _register() -> None:
    AttentionInterface.register(BY_DOCUMENT, attention_by_document)
    AttentionMaskInterface.register(BY_DOCUMENT, flash_attention_mask)


def attention_by_document(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """What transformers' flash attention computes for these arguments, in plain torch; it holds all scores at once.

    Like that, it keeps documents apart by ``cu_seq_lens_q``, or by ``position_ids`` in a batch of one row, or else
    not at all.

    Args:
        query: [B, heads, S, D].
        key, value: [B, heads, S, D], or fewer heads for groups of queries.
        attention_mask: None, or int [B, S], 0 for padding, which nothing sees.

    Returns:
        [B, S, heads, D] and None.
    """
    rows, heads, length, width = query.shape
    if cu_seq_lens_q is None:
        if rows == 1 and position_ids is not None:
            places = position_ids
        else:
            places = torch.arange(length, device=query.device).expand(rows, length)
        cu_seq_lens_q = document_lengths(places).edges

    def laid_end_to_end(states: Tensor) -> Tensor:
        """[1, heads, B * S, D]"""
        states = states.repeat_interleave(heads // states.shape[1], dim=1)
        return states.transpose(0, 1).reshape(1, heads, rows * length, -1)

    query, key, value = laid_end_to_end(query), laid_end_to_end(key), laid_end_to_end(value)
    place = torch.arange(rows * length, device=query.device)
    document = torch.bucketize(place, cu_seq_lens_q.to(place), right=True)
    behind = place[:, None] - place
    seen = (document[:, None] == document) & (behind >= 0)
    if sliding_window is not None:
        seen &= behind < sliding_window
    if attention_mask is not None:
        seen &= attention_mask.flatten().bool()
    scores = query @ key.transpose(-1, -2) * (scaling if scaling is not None else 1 / math.sqrt(width))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, -torch.inf)
    if s_aux is not None:  # a sink for each head: a score without a value
        scores = torch.cat([scores, s_aux.view(1, heads, 1, 1).expand(1, heads, len(place), 1)], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : len(place)]
    return (weights @ value).reshape(heads, rows, length, -1).permute(1, 2, 0, 3).contiguous(), None


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
