"""A family's model with adapters: two steps in two stages beside PEFT's own model in one piece."""

from __future__ import annotations

import copy
import tempfile
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from dstrain.lora import Adapter, base_name, is_adapter_parameter, saved_name
from dstrain.model.adapters import Adapters, lora_config
from dstrain.model.loss import TokenLoss
from dstrain.model.pipeline_model import PipelineModel
from dstrain.model.pipeline_split.structure import takes_positions

ROWS, LENGTH, SEED, STEPS, RATE = 2, 12, 3, 2, 0.1


def difference_to_peft(config: PretrainedConfig, adapter: Adapter) -> float:
    """The largest difference of a loss, or of an adapter's weight relative to its largest, after two steps of SGD.

    Raises:
        DstrainError: the family can't be split, or PEFT can't adapt it.
    """
    from peft import get_peft_model, set_peft_model_state_dict

    adapters = Adapters(config, adapter, seed=SEED)
    ranks = [PipelineModel(config, seed=SEED, attention="auto", adapters=adapters) for _ in range(2)]
    middle = ranks[0].num_layers // 2
    cuts = ((0, middle), (middle, ranks[0].num_layers))
    stages = [[rank.build(index) for index in range(*cut)] for rank, cut in zip(ranks, cuts, strict=True)]
    ours: dict[str, Tensor] = {}
    for layer in (layer for stage in stages for layer in stage):
        ours |= dict(layer.named_parameters(remove_duplicate=False))
    torch.manual_seed(SEED)
    model: Any = AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=False)
    weights = _weights(config) if adapter.base else ours
    weights = {base_name(name): value for name, value in weights.items() if not is_adapter_parameter(name)}
    with torch.no_grad():
        for name, parameter in model.named_parameters(remove_duplicate=False):
            parameter.copy_(weights[name])
    if adapter.base:
        model = _quantized(model, adapters)
    adapted = get_peft_model(model, lora_config(adapter))
    trained = {name: value for name, value in ours.items() if is_adapter_parameter(name)}
    loaded = set_peft_model_state_dict(
        adapted, {saved_name(n): v.detach().clone() for n, v in trained.items()}
    )
    assert not loaded.unexpected_keys, loaded.unexpected_keys
    theirs = {
        name.removeprefix("base_model.model."): value
        for name, value in adapted.named_parameters()
        if value.requires_grad
    }
    assert theirs.keys() == trained.keys() == {name for name, value in ours.items() if value.requires_grad}
    adapted.train()
    apart = 0.0
    for step in range(STEPS):
        batch = _batch(config, step)
        mine, wanted = _in_stages(stages, batch), _in_one(adapted, model, batch)
        apart = max(apart, abs(mine - wanted))
        for parameters in (trained, theirs):
            with torch.no_grad():
                for value in parameters.values():
                    if value.grad is not None:
                        value -= RATE * value.grad
                        value.grad = None
    for name, value in trained.items():
        largest = max(float(theirs[name].abs().max()), 1e-3)
        apart = max(apart, float((value - theirs[name]).abs().max()) / largest)
    return apart


def _weights(config: PretrainedConfig) -> dict[str, Tensor]:
    model = PipelineModel(config, seed=SEED, attention="auto")
    return {
        name: value
        for index in range(model.num_layers)
        for name, value in model.build(index).named_parameters(remove_duplicate=False)
    }


def _quantized(model: Any, adapters: Adapters) -> Any:
    """The same as transformers loads it with bitsandbytes."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = type(model).from_pretrained(
            folder,
            dtype=torch.float32,
            device_map={"": "cpu"},
            quantization_config=adapters.quantization_config(torch.float32),
        )
    for module in loaded.modules():
        module.support_avx512bf16_for_cpu = False
    return loaded


Batch = tuple[Tensor, Tensor, Tensor, Tensor]


def _batch(config: PretrainedConfig, step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(3, getattr(config, "vocab_size", 99), (ROWS, LENGTH), generator=generator)
    labels = torch.cat([ids[:, 1:], torch.full((ROWS, 1), -100)], dim=1)
    weight = torch.tensor([1 / (ROWS * (LENGTH - 1))])
    return ids, torch.arange(LENGTH).repeat(ROWS, 1), labels, weight


def _in_one(adapted: Any, model: Any, batch: Batch) -> float:
    ids, positions, labels, weight = batch
    torch.manual_seed(SEED)
    options = {"position_ids": positions} if takes_positions(model) else {}
    loss = TokenLoss()(adapted(input_ids=ids, use_cache=False, **options).logits, (labels, weight))
    loss.backward()
    return float(loss.detach())


def _in_stages(stages: list[list[Any]], batch: Batch) -> float:
    """What is sent is cut off from what it was computed from."""
    ids, positions, labels, weight = batch
    torch.manual_seed(SEED)
    state: Any = (ids, positions)
    for layer in stages[0]:
        state = layer.train()(state)
    received = tuple(t.detach().clone().requires_grad_(t.is_floating_point()) for t in state)
    sent, state = state, received
    for layer in stages[1]:
        state = layer.train()(state)
    loss = TokenLoss()(state, (labels, weight))
    loss.backward()
    pairs = [
        (s, r.grad) for s, r in zip(sent, received, strict=True) if r.grad is not None and s.requires_grad
    ]
    torch.autograd.backward([s for s, _ in pairs], [gradient for _, gradient in pairs])
    return float(loss.detach())
