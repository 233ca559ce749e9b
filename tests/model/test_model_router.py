"""The router loss of mixtures of experts: the family's own, however its blocks are spread."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, MixtralConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dstrain.model.capability.small_model import small_family
from dstrain.model.layers import HeadLayer
from dstrain.model.loss import TokenLoss
from dstrain.model.pipeline_model import PipelineModel
from dstrain.model.pipeline_split.probe import why_not_pipelined
from dstrain.model.router import router_coefficient
from dstrain.model.unsplit_model import UnsplitModel
from tests.support.model_families import batch


def families_with_a_router_loss() -> set[str]:
    """Those whose forward can add one, found in the source of transformers: to import all of it takes seconds."""
    found = set()
    for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        module = model_type_to_module_name(name)
        source = Path(transformers.__file__).parent / "models" / module / f"modeling_{module}.py"
        text = source.read_text(encoding="utf-8") if source.exists() else ""
        if "load_balancing_loss_func" in text and "output_router_logits: bool" in text:
            found.add(name)
    return found


FAMILIES = families_with_a_router_loss()
OF_ANOTHER_KIND = {"doge"}
"""Its experts are chosen by two keys each."""


def routed(name: str) -> PretrainedConfig:
    config = small_family(CONFIG_MAPPING[name])
    config.output_router_logits = True
    if name == "doge":
        config.is_moe = True
    if hasattr(config, "router_aux_loss_coef"):
        config.router_aux_loss_coef = 0.3  # so large that it can't be overlooked
    return config


def test_there_are_many_such_families() -> None:
    assert len(FAMILIES) >= 20


@pytest.mark.parametrize("name", sorted(FAMILIES - OF_ANOTHER_KIND))
def test_three_stages_have_the_loss_of_the_family_itself(name: str) -> None:
    config = routed(name)
    if reason := why_not_pipelined(config, "auto"):
        config.output_router_logits = False
        assert why_not_pipelined(config, "auto"), f"only its router loss is refused: {reason}"
        pytest.skip(f"{name} is not split at all: {reason}")
    ids, positions, labels, weight = batch()
    stages = [PipelineModel(config, seed=3, attention="auto") for _ in range(3)]
    count = stages[0].num_layers
    bounds = [0, 2, count - 2, count]
    layers = [
        [stage.build(index) for index in range(bounds[number], bounds[number + 1])]
        for number, stage in enumerate(stages)
    ]

    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32).train()
    values = {n: p for stage in layers for layer in stage for n, p in layer.named_parameters()}
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            parameter.copy_(values[path])
    # Without labels a family leaves its loss to the caller, and still says what its routers add.
    output = model(input_ids=ids, position_ids=positions, use_cache=False, output_router_logits=True)
    coefficient = router_coefficient(model)
    assert coefficient > 0
    plain = TokenLoss()(output.logits, (labels, weight))
    wanted = plain + coefficient * output.aux_loss
    wanted.backward()
    assert wanted > 1.001 * plain

    sent: list[tuple[torch.Tensor, ...]] = []
    state: tuple[torch.Tensor, ...] = (ids, positions)
    received = [state]
    for number, stage in enumerate(layers):
        for layer in stage:
            if isinstance(layer, HeadLayer):
                with layer.asked(target=(labels, weight)):
                    loss = layer(state)
            else:
                state = layer(state)
        if number < 2:
            sent.append(state)
            state = tuple(t.detach().clone().requires_grad_(t.is_floating_point()) for t in state)
            received.append(state)
    loss.backward()
    for outputs, inputs in zip(reversed(sent), reversed(received), strict=False):
        floats = [(o, i.grad) for o, i in zip(outputs, inputs, strict=True) if o.is_floating_point()]
        assert all(gradient is not None for _, gradient in floats)
        torch.autograd.backward(*zip(*floats, strict=True))

    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)
    for path, parameter in model.named_parameters():
        parts = [p for stage in layers for layer in stage for n, p in layer.named_parameters() if n == path]
        own = {id(p): p.grad for p in parts if p.grad is not None}
        if parameter.grad is None:
            assert not own, path
        elif "embed" not in path and "lm_head" not in path:  # tied ones are summed by the engine
            torch.testing.assert_close(sum(own.values()), parameter.grad, rtol=1e-4, atol=1e-6, msg=path)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "doge"])
def test_a_whole_model_has_it_too(name: str) -> None:
    config = routed(name)
    ids, positions, labels, weight = batch()
    whole = UnsplitModel(config, seed=3, attention="auto")
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32).train()
    model.load_state_dict({n: p.detach() for n, p in whole.named_parameters()}, strict=False)
    output = model(input_ids=ids, position_ids=positions, use_cache=False, output_router_logits=True)
    plain = TokenLoss()(output.logits, (labels, weight))
    with whole.asked(target=(labels, weight)):
        training = whole.train()((ids, positions))
        validation = whole.eval()((ids, positions))
    torch.testing.assert_close(
        training, plain + router_coefficient(model) * output.aux_loss, rtol=1e-6, atol=0
    )
    torch.testing.assert_close(validation, plain, rtol=1e-6, atol=0)


def test_another_kind_of_router_loss_is_refused() -> None:
    config = routed("doge")
    assert "router loss" in (why_not_pipelined(config, "auto") or "")
    config.output_router_logits = False
    assert why_not_pipelined(config, "auto") is None


def test_nothing_is_added_unless_it_is_asked_for() -> None:
    config = small_family(MixtralConfig)
    assert config.output_router_logits is False
    model = PipelineModel(config, seed=3, attention="auto")
    ids, positions, _, _ = batch()
    assert len(model.build(0)((ids, positions))) == 2
