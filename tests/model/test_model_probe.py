"""What cannot be split is refused, with the reason."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, LlamaConfig
from transformers.models.llama import modeling_llama

from dstrain.errors import DstrainError
from dstrain.model.architecture import load_config
from dstrain.model.capability.independence import packing_leaks
from dstrain.model.pipeline_model import PipelineModel
from dstrain.model.pipeline_split.probe import why_not_pipelined
from tests.support.model_families import COMMON, FAMILIES, GQA, tiny


@pytest.mark.parametrize("name", FAMILIES)
def test_families_that_can_be_split(name):
    assert why_not_pipelined(tiny(name)) is None


def test_missing_initial_values_are_refused(monkeypatch):
    original = modeling_llama.LlamaMLP.__init__

    def init(self, config):
        original(self, config)
        self.slope = nn.Parameter(torch.empty(3))

    monkeypatch.setattr(modeling_llama.LlamaMLP, "__init__", init)
    reason = why_not_pipelined(tiny("llama"))
    assert reason and "no initial value for model.layers.0.mlp.slope" in reason


def test_large_vocabularies_do_not_slow_the_packing_test():
    assert packing_leaks(tiny("llama", vocab_size=1_000_000, pad_token_id=999_999)) is None


def test_layer_drop_is_refused():
    reason = why_not_pipelined(tiny("opt", layerdrop=0.1))
    assert reason and "layerdrop" in reason


def test_an_encoder_decoder_is_refused():
    reason = why_not_pipelined(
        CONFIG_MAPPING["t5"](d_model=32, d_ff=64, num_layers=2, num_heads=4, vocab_size=99)
    )
    assert reason


def test_gemma3n_is_refused():
    config = _gemma3n()
    reason = why_not_pipelined(config)
    assert reason and "hidden" in reason
    with pytest.raises(DstrainError, match="cannot be split"):
        PipelineModel(config, seed=0)


def _gemma3n():
    values = {
        **COMMON,
        **GQA,
        "vocab_size_per_layer_input": 99,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
    }
    values |= {
        "intermediate_size": [64] * 4,
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.0] * 4,
    }
    return CONFIG_MAPPING["gemma3n_text"](**values, layer_types=["full_attention"] * 4)


class TestTamperedLlama:
    """The probe sees each thing that the layers could not carry, put into a family that is otherwise fine."""

    @pytest.fixture
    def refusal(self, monkeypatch):
        def tamper(forward):
            original = modeling_llama.LlamaModel.forward
            monkeypatch.setattr(
                modeling_llama.LlamaModel, "forward", lambda self, *a, **k: forward(self, original, *a, **k)
            )
            return why_not_pipelined(tiny("llama"))

        return tamper

    def test_code_between_blocks(self, refusal):
        def forward(self, original, input_ids, position_ids, **kwargs):
            hidden = self.embed_tokens(input_ids)
            tables = self.rotary_emb(hidden, position_ids)
            for layer in self.layers:
                hidden = layer(hidden, position_embeddings=tables) * 2
            return modeling_llama.BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))

        reason = refusal(forward)
        assert reason and "between blocks 0 and 1" in reason

    def test_learned_arguments(self, refusal):
        def forward(self, original, input_ids, position_ids, **kwargs):
            hidden = first = self.embed_tokens(input_ids)
            for layer in self.layers:
                hidden = layer(hidden, position_embeddings=self.rotary_emb(hidden, position_ids), skip=first)
            return modeling_llama.BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))

        reason = refusal(forward)
        assert reason and "skip is learned" in reason

    def test_token_dependent_arguments(self, refusal):
        def forward(self, original, input_ids, position_ids, **kwargs):
            hidden = self.embed_tokens(input_ids)
            tables = self.rotary_emb(hidden, position_ids)
            mask = (input_ids != 0)[:, None, None, :]
            for layer in self.layers:
                hidden = layer(hidden, position_embeddings=tables, attention_mask=mask)
            return modeling_llama.BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))

        reason = refusal(forward)
        assert reason and "attention_mask depends on the tokens" in reason

    def test_head_that_looks_at_an_early_block(self, refusal):
        def forward(self, original, input_ids, position_ids, **kwargs):
            hidden, all_hidden = self.embed_tokens(input_ids), []
            tables = self.rotary_emb(hidden, position_ids)
            for layer in self.layers:
                hidden = layer(hidden, position_embeddings=tables)
                all_hidden.append(hidden)
            return modeling_llama.BaseModelOutputWithPast(last_hidden_state=self.norm(hidden + all_hidden[0]))

        reason = refusal(forward)
        assert reason and "more than the last block" in reason

    def test_head_that_looks_at_tokens(self, refusal):
        def forward(self, original, input_ids, position_ids, **kwargs):
            hidden = self.embed_tokens(input_ids)
            tables = self.rotary_emb(hidden, position_ids)
            for layer in self.layers:
                hidden = layer(hidden, position_embeddings=tables)
            hidden = hidden * (input_ids != 0)[..., None]
            return modeling_llama.BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))

        reason = refusal(forward)
        assert reason and "depend" in reason

    def test_blocks_run_twice(self, refusal):
        def forward(self, original, input_ids, position_ids, **kwargs):
            hidden = self.embed_tokens(input_ids)
            tables = self.rotary_emb(hidden, position_ids)
            for layer in [*self.layers, *self.layers]:
                hidden = layer(hidden, position_embeddings=tables)
            return modeling_llama.BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))

        reason = refusal(forward)
        assert reason and "once each" in reason

    def test_shared_state(self, refusal, monkeypatch):
        original_block = modeling_llama.LlamaDecoderLayer.forward

        def block(self, hidden, notes=None, **kwargs):
            notes[self.self_attn.layer_idx] = 1
            return original_block(self, hidden, **kwargs)

        monkeypatch.setattr(modeling_llama.LlamaDecoderLayer, "forward", block)

        def forward(self, original, input_ids, position_ids, **kwargs):
            hidden, notes = self.embed_tokens(input_ids), {}
            tables = self.rotary_emb(hidden, position_ids)
            for layer in self.layers:
                hidden = layer(hidden, position_embeddings=tables, notes=notes)
            return modeling_llama.BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))

        reason = refusal(forward)
        assert reason and "share state" in reason

    def test_shared_weights(self, monkeypatch):
        original = modeling_llama.LlamaModel.__init__

        def init(self, config):
            original(self, config)
            self.layers[1].mlp.up_proj.weight = self.layers[0].mlp.up_proj.weight

        monkeypatch.setattr(modeling_llama.LlamaModel, "__init__", init)
        reason = why_not_pipelined(tiny("llama"))
        assert reason and "are one weight" in reason

    def test_a_weight_of_no_layer(self, monkeypatch):
        original = modeling_llama.LlamaModel.__init__

        def init(self, config):
            original(self, config)
            self.bias = nn.Parameter(torch.zeros(3))

        monkeypatch.setattr(modeling_llama.LlamaModel, "__init__", init)
        reason = why_not_pipelined(tiny("llama"))
        assert reason and "model.bias belongs to no layer" in reason


class TestLoadConfig:
    def write(self, tmp_path, text):
        path = tmp_path / "config.json"
        path.write_text(text)
        return path

    def test_folder_and_file(self, tmp_path):
        path = self.write(tmp_path, json.dumps(tiny("llama").to_dict()))
        assert isinstance(load_config(tmp_path), LlamaConfig)
        assert load_config(str(path)).hidden_size == 32

    def test_the_text_part_of_a_multimodal_model(self, tmp_path):
        self.write(tmp_path, json.dumps({"model_type": "gemma3", "text_config": {"num_hidden_layers": 3}}))
        config = load_config(tmp_path)
        assert (config.model_type, config.num_hidden_layers) == ("gemma3_text", 3)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{", "malformed JSON"),
            ("[]", "expected a JSON object"),
            ("{}", "no model_type"),
            ('{"model_type": "lama"}', "did you mean 'llama'"),
            ('{"model_type": "nonsense-of-mine", "auto_map": {}}', "own code"),
            ('{"model_type": "t5"}', "no causal language model"),
            ('{"model_type": "llama", "hidden_size": "wide"}', "refused"),
        ],
    )
    def test_errors_say_where(self, tmp_path, text, message):
        path = self.write(tmp_path, text)
        with pytest.raises(DstrainError) as caught:
            load_config(tmp_path)
        assert message in str(caught.value)
        assert caught.value.where and caught.value.where.startswith(str(path))

    def test_missing(self, tmp_path):
        with pytest.raises(DstrainError, match="no such model configuration") as caught:
            load_config(tmp_path / "nowhere")
        assert "nowhere" in (caught.value.where or "")
