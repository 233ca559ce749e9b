"""Tests whether a model's layers compute the same as Hugging Face's model, split and unsplit."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from dstrain.errors import DstrainError
from dstrain.model.loss import TokenLoss
from dstrain.model.pipeline_model import PipelineModel
from dstrain.model.pipeline_split.structure import takes_positions
from dstrain.model.unsplit_model import UnsplitModel

ROWS, LENGTH = 2, 12
SEED = 3
CLOSE = 1e-6
"""How far results may be apart where a family's forward sums in another order when it is cut; else they are equal."""

SPREAD = 0.35
"""How far the deviations of two random draws of the same initial weight may be apart, of 200 values and more."""


def compare_stages(config: PretrainedConfig) -> float:
    """The largest difference of a 2-stage and a 3-stage split to Hugging Face's model with the same weights.

    Each third of the layers has a skeleton of its own, as on a rank of its own.

    Raises:
        DstrainError: the family cannot be split.
        AssertionError: parameters have other names than in Hugging Face, or a gradient is missing.
    """
    ranks = [PipelineModel(config, seed=SEED, attention="auto") for _ in range(3)]
    count = ranks[0].num_layers
    layers = [rank.build(i) for rank, cut in zip(ranks, _cut(count, 3), strict=True) for i in range(*cut)]
    weights: dict[str, list[nn.Parameter]] = {}
    for layer in layers:
        for name, weight in layer.named_parameters(remove_duplicate=False):
            weights.setdefault(name, []).append(weight)
    model = reference(config, weights)
    wanted = _run_reference(model)
    return max(
        _difference(wanted, _run_stages([layers[i:j] for i, j in _cut(count, stages)], weights, model))
        for stages in (2, 3)
    )


def _cut(layers: int, stages: int) -> list[tuple[int, int]]:
    """Where the layers of each stage begin and end."""
    ends = [layers * stage // stages for stage in range(stages + 1)]
    return list(pairwise(ends))


def reference(config: PretrainedConfig, weights: dict[str, list[nn.Parameter]]) -> PreTrainedModel:
    """Hugging Face's own model, in training mode, with these weights.

    Raises:
        AssertionError: its parameters have other names, or initial values of another size.
    """
    torch.manual_seed(SEED)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        copy.deepcopy(config), dtype=torch.float32, trust_remote_code=False
    ).train()
    own = dict(model.named_parameters(remove_duplicate=False))
    assert set(own) == set(weights), f"other names: {sorted(set(own) ^ set(weights))}"
    with torch.no_grad():
        for name, weight in own.items():
            _same_spread(name, weight, weights[name][0])
            weight.copy_(weights[name][0])
    return model


def _same_spread(name: str, theirs: Tensor, ours: Tensor) -> None:
    """Both were drawn at random, so of large weights mean and deviation are about the same, if the family is heard."""
    if theirs.numel() < 200:
        return
    size = max(float(theirs.std()), float(theirs.mean().abs()), 1e-6)
    apart = max(float((theirs.std() - ours.std()).abs()), float((theirs.mean() - ours.mean()).abs()))
    assert apart < SPREAD * size, f"{name} starts otherwise than in Hugging Face: {apart:.2g} of {size:.2g}"


@dataclass(frozen=True)
class Outcome:
    """What one forward and backward pass gave: logits [B, S, V], loss, gradients by parameter."""

    logits: Tensor
    loss: Tensor
    gradients: dict[str, Tensor]


def _batch(config: PretrainedConfig) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """input_ids, position_ids, labels, and weight (1 / label tokens) of the loss."""
    vocabulary = getattr(config, "vocab_size", 99)
    ids = torch.randint(3, vocabulary, (ROWS, LENGTH), generator=torch.Generator().manual_seed(5))
    labels = torch.cat([ids[:, 1:], torch.full((ROWS, 1), -100)], dim=1)
    return ids, torch.arange(LENGTH).repeat(ROWS, 1), labels, torch.tensor([1 / (ROWS * (LENGTH - 1))])


def _run_unsplit(model: PreTrainedModel | UnsplitModel, forward: Any) -> Outcome:
    ids, positions, labels, weight = _batch(model.config)
    torch.manual_seed(SEED)
    logits = forward(ids, positions)
    loss = TokenLoss()(logits, (labels, weight))
    loss.backward()
    return Outcome(logits, loss, _gradients(model))


def _run_reference(model: PreTrainedModel) -> Outcome:
    def forward(ids: Tensor, positions: Tensor) -> Tensor:
        options = {"position_ids": positions} if takes_positions(model) else {}
        logits: Tensor = model(input_ids=ids, use_cache=False, **options).logits
        return logits

    return _run_unsplit(model, forward)


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    """By each parameter's first name; zeros where a weight was not used."""
    return {
        name: torch.zeros_like(weight) if weight.grad is None else weight.grad
        for name, weight in model.named_parameters()
    }


def _run_stages(
    stages: list[list[nn.Module]], weights: dict[str, list[nn.Parameter]], model: PreTrainedModel
) -> Outcome:
    """Forward and backward as a pipeline does them: what is sent is cut off from what it was computed from."""
    ids, positions, labels, weight = _batch(model.config)
    for copies in weights.values():
        for one in copies:
            one.grad = None
    state: Any = (ids, positions)
    seams: list[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]] = []
    for number, stage in enumerate(stages):
        if number > 0:
            received = tuple(_received(tensor) for tensor in state)
            seams.append((state, received))
            state = received
        for layer in stage:
            state = layer(state)
    loss = TokenLoss()(state, (labels, weight))
    loss.backward()
    for sent, received in reversed(seams):
        floats = [(s, r.grad) for s, r in zip(sent, received, strict=True) if r.grad is not None]
        torch.autograd.backward([s for s, _ in floats], [g for _, g in floats])
    return Outcome(state, loss, _summed(weights, model))


def _received(tensor: Tensor) -> Tensor:
    copied = tensor.detach().clone()
    return copied.requires_grad_() if copied.is_floating_point() else copied


def _summed(weights: dict[str, list[nn.Parameter]], model: PreTrainedModel) -> dict[str, Tensor]:
    """The gradients of all copies of each of the model's weights, tied ones included, added up."""
    names: dict[int, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(weight), []).append(name)
    total = {}
    for same in names.values():
        copies = {id(one): one for name in same for one in weights[name]}.values()
        found = [one.grad for one in copies if one.grad is not None]
        total[same[0]] = sum(found[1:], start=found[0]) if found else torch.zeros_like(weights[same[0]][0])
    return total


def _difference(wanted: Outcome, got: Outcome) -> float:
    pairs = [(wanted.logits, got.logits), (wanted.loss, got.loss)]
    pairs += [(gradient, got.gradients[name]) for name, gradient in wanted.gradients.items()]
    largest = torch.stack([(a.detach() - b.detach()).abs().max() for a, b in pairs if a.numel()]).max()
    if not torch.isfinite(largest):
        raise AssertionError("some results are not numbers")
    return float(largest)


def compare_unsplit(config: PretrainedConfig) -> str | None:
    """Why a model of this family does not train in one piece, or None."""
    try:
        model = UnsplitModel(config, seed=SEED, attention="auto").train()
        weights = {name: [weight] for name, weight in model.named_parameters(remove_duplicate=False)}
        wanted = _run_reference(reference(config, weights))
        got = _run_unsplit(model, lambda ids, positions: model((ids, positions)))
    except DstrainError as error:
        return error.message
    except Exception as error:  # whatever the family's code runs into
        return f"it does not run on plain text ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
    if _difference(wanted, got):
        return "it computes something else than in Hugging Face"
    return None
