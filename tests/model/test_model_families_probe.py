"""What the probe lets pass, and what it still refuses, for families that do more than hand on a hidden state."""

from __future__ import annotations

from collections import UserDict

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING
from transformers.models.llama import modeling_llama

from dstrain.model.capability.small_model import small_family
from dstrain.model.pipeline_model import PipelineModel
from dstrain.model.pipeline_split.probe import why_not_pipelined
from dstrain.model.skeleton import HUGE, empty_model
from dstrain.model.unsplit_model import UnsplitModel
from tests.support.model_families import tiny


def family(name, **choices):
    return small_family(CONFIG_MAPPING[name], **choices)


@pytest.fixture
def second_output(monkeypatch):
    """A llama whose blocks return a second value, which the next block is given."""

    def tamper(look, value):
        original = modeling_llama.LlamaDecoderLayer.forward

        def block(self, hidden, before=None, **kwargs):
            hidden = original(self, hidden, **kwargs)
            return (hidden + 0 * before if look(self.self_attn.layer_idx) else hidden), value(hidden)

        def forward(self, input_ids, position_ids, **kwargs):
            hidden, before = self.embed_tokens(input_ids), None
            tables = self.rotary_emb(hidden, position_ids)
            for layer in self.layers:
                hidden, before = layer(hidden, before=before, position_embeddings=tables)
            return modeling_llama.BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))

        monkeypatch.setattr(modeling_llama.LlamaDecoderLayer, "forward", block)
        monkeypatch.setattr(modeling_llama.LlamaModel, "forward", forward)
        return why_not_pipelined(tiny("llama"))

    return tamper


def test_a_second_output_may_be_handed_on_if_nobody_looks_at_it(second_output):
    assert second_output(lambda index: False, lambda hidden: hidden) is None


def test_a_second_output_that_one_block_looks_at_is_refused(second_output):
    reason = second_output(lambda index: index == 3, lambda hidden: hidden)
    assert reason and "beside the hidden state is used" in reason


def test_a_second_output_that_is_none_is_handed_on_as_none(second_output):
    assert second_output(lambda index: False, lambda hidden: None) is None


def test_blocks_that_reuse_the_choice_of_the_one_before_are_refused():
    """As a configuration of glm_moe_dsa may ask for; by its defaults each block chooses for itself."""
    assert why_not_pipelined(family("glm_moe_dsa")) is None
    types = ["full", "full", "shared", "full"]
    reason = why_not_pipelined(family("glm_moe_dsa", indexer_types=types))
    assert reason and "beside the hidden state is used" in reason


@pytest.mark.parametrize("fills", [False, True])
def test_a_dict_of_its_own_class_is_refused_if_a_block_fills_it(monkeypatch, fills):
    """gemma4's blocks share keys through one, where the configuration says so."""
    original = modeling_llama.LlamaDecoderLayer.forward

    def block(self, hidden, shared=None, **kwargs):
        if fills and self.self_attn.layer_idx == 1:
            shared["key"] = hidden
        return original(self, hidden, **kwargs)

    def forward(self, input_ids, position_ids, **kwargs):
        hidden, shared = self.embed_tokens(input_ids), UserDict()
        tables = self.rotary_emb(hidden, position_ids)
        for layer in self.layers:
            hidden = layer(hidden, shared=shared, position_embeddings=tables)
        return modeling_llama.BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))

    monkeypatch.setattr(modeling_llama.LlamaDecoderLayer, "forward", block)
    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", forward)
    reason = why_not_pipelined(tiny("llama"))
    assert ("share state" in reason) if fills else reason is None


def test_a_hidden_state_of_several_streams_passes():
    assert PipelineModel(family("qwen4_exp_text"), seed=0)._structure.hidden == (128,)
    assert PipelineModel(tiny("llama"), seed=0)._structure.hidden == (32,)


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("modernbert-decoder", {}),  # the model sets the head's values
        ("modernbert-decoder", {"tie_word_embeddings": False}),
        ("openai-gpt", {}),  # only the constructor sets values
    ],
)
def test_initial_values_do_not_depend_on_which_layers_are_here(name, choices):
    config = family(name, **choices)
    together = PipelineModel(config, seed=1, attention="auto")
    layers = [together.build(i) for i in range(together.num_layers)]
    for index, layer in enumerate(layers):
        alone = PipelineModel(config, seed=1, attention="auto").build(index)
        for path, weight in alone.named_parameters():
            assert torch.equal(weight, layer.get_parameter(path)), path


def test_initial_values_from_a_constructor_are_those_of_the_whole_model():
    whole = UnsplitModel(family("openai-gpt"), seed=1, attention="auto")
    layers = PipelineModel(family("openai-gpt"), seed=1, attention="auto")
    for index in range(layers.num_layers):
        for path, weight in layers.build(index).named_parameters():
            assert torch.equal(weight, whole.get_parameter(path)), path


def test_what_a_constructor_draws_is_drawn_from_the_seed():
    one, other = (UnsplitModel(family("openai-gpt"), seed=seed, attention="eager") for seed in (1, 2))
    name = "transformer.h.0.attn.c_attn.weight"
    assert one.get_parameter(name).std().item() == pytest.approx(0.02, rel=0.1)
    assert not torch.equal(one.get_parameter(name), other.get_parameter(name))


@pytest.mark.parametrize("name", ["glm_moe_dsa", "llama4_text"])
def test_all_experts_of_a_block_in_one_weight_take_no_memory(name):
    """5 to 25 GB for each block of these families' defaults: more than many machines would give."""
    model = empty_model(CONFIG_MAPPING[name](num_hidden_layers=4))
    weights = {name: weight for name, weight in model.named_parameters() if weight.numel() > HUGE}
    assert any("experts" in name for name in weights)
    assert all(weight.is_meta for weight in weights.values())


def test_a_model_that_sets_values_of_several_layers_is_refused(monkeypatch):
    original = modeling_llama.LlamaPreTrainedModel._init_weights

    def init(self, module):
        original(self, module)
        if isinstance(module, modeling_llama.LlamaModel):
            for layer in module.layers:
                nn.init.normal_(layer.mlp.up_proj.weight)

    monkeypatch.setattr(modeling_llama.LlamaPreTrainedModel, "_init_weights", init)
    reason = why_not_pipelined(tiny("llama"))
    assert reason and "set from outside its layer" in reason
