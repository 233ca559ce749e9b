"""Initial weights: the family's own distribution, independent of the layout."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from dstrain.model.pipeline_model import PipelineModel
from tests.support.model_families import FAMILIES, tiny


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "deepseek_v3", "opt"])
def test_a_layer_does_not_depend_on_its_neighbours(name):
    together = PipelineModel(tiny(name), seed=1)
    layers = [together.build(i) for i in range(together.num_layers)]
    for index in reversed(range(together.num_layers)):
        alone = PipelineModel(tiny(name), seed=1).build(index)
        for (path, one), (_, other) in zip(
            alone.named_parameters(), layers[index].named_parameters(), strict=True
        ):
            assert torch.equal(one, other), path


def test_global_random_state_is_untouched():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    model = PipelineModel(tiny("llama-tied"), seed=1)
    model.build(5)
    assert torch.equal(before, torch.get_rng_state())


def test_seeds_differ():
    one, two = (PipelineModel(tiny("llama"), seed=s).build(0).model.embed_tokens.weight for s in (1, 2))
    assert not torch.equal(one, two)


def test_blocks_differ():
    model = PipelineModel(tiny("llama"), seed=1)
    one, two = (dict(model.build(i).named_parameters()) for i in (1, 2))
    assert not torch.equal(
        one["model.layers.0.self_attn.q_proj.weight"], two["model.layers.1.self_attn.q_proj.weight"]
    )


def test_distribution_is_the_family_s():
    config = tiny("llama", hidden_size=128, intermediate_size=256, initializer_range=0.05, pad_token_id=0)
    model = PipelineModel(config, seed=1)
    block, embed = model.build(1), model.build(0)
    for path, param in block.named_parameters():
        if "norm" in path:
            assert torch.equal(param, torch.ones_like(param))
        else:
            assert param.std().item() == pytest.approx(0.05, rel=0.05), path
            assert abs(param.mean().item()) < 5 * 0.05 / math.sqrt(param.numel()), path
    assert torch.equal(embed.model.embed_tokens.weight[0], torch.zeros(128))


def test_gpt2_scales_its_residual_projections():
    config = tiny("gpt2", n_embd=128)
    block = PipelineModel(config, seed=1).build(1)
    std = block.get_parameter("transformer.h.0.mlp.c_proj.weight").std().item()
    assert std == pytest.approx(0.02 / math.sqrt(2 * 4), rel=0.05)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_is_spread_as_in_hugging_face(name):
    config = tiny(name)
    model = PipelineModel(config, seed=1, attention="auto")
    theirs = AutoModelForCausalLM.from_config(config)
    for index in range(model.num_layers):
        for path, ours in model.build(index).named_parameters():
            wanted = theirs.get_parameter(path)
            assert ours.shape == wanted.shape
            if wanted.numel() < 2 or wanted.std() == 0:
                assert torch.equal(ours, wanted), path
            elif wanted.numel() > 200:
                assert ours.std().item() == pytest.approx(wanted.std().item(), rel=0.3), path


def test_tied_weights_are_one_parameter_where_both_are_local():
    model = PipelineModel(tiny("llama-tied"), seed=1)
    (tied,) = model.tied
    assert tied.key == "model.embed_tokens.weight"
    assert tied.owners == ((0, "model.embed_tokens.weight"), (5, "lm_head.weight"))
    head, embed = model.build(5), model.build(0)  # in either order
    assert head.lm_head.weight is embed.model.embed_tokens.weight
    apart = PipelineModel(tiny("llama-tied"), seed=1).build(5)
    assert apart.lm_head.weight is not head.lm_head.weight
    assert torch.equal(apart.lm_head.weight, head.lm_head.weight)
    assert not PipelineModel(tiny("llama"), seed=1).tied


def test_parameters_are_rounded_once():
    exact = PipelineModel(tiny("llama"), seed=1).build(1)
    rounded = PipelineModel(tiny("llama"), seed=1, dtype=torch.bfloat16).build(1)
    for one, other in zip(exact.parameters(), rounded.parameters(), strict=True):
        assert torch.equal(one.to(torch.bfloat16), other)
