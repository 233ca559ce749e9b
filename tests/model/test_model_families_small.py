"""A small copy of a real configuration is the same kind of model."""

from __future__ import annotations

import pytest
from transformers import CONFIG_MAPPING

from dstrain.errors import DstrainError
from dstrain.model.capability.small_model import small_config, small_family
from dstrain.model.capability.small_sizes import BLOCKS
from dstrain.model.skeleton import empty_model

MIXED = ["sliding_attention"] * 5 + ["full_attention"]

REAL = {
    "llama-3.1": (
        "llama",
        {
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "bos_token_id": 128000,
            "eos_token_id": [128001, 128008, 128009],
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
    ),
    "phi-3-long": (
        "phi3",
        {
            "max_position_embeddings": 131072,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * 48,
                "long_factor": [2.0] * 48,
                "original_max_position_embeddings": 4096,
            },
        },
    ),
    "deepseek-v3": ("deepseek_v3", {"num_hidden_layers": 61, "n_group": 8, "topk_group": 4}),
    "qwen2-sliding": (
        "qwen2",
        {"use_sliding_window": True, "max_window_layers": 21, "num_hidden_layers": 28},
    ),
    "qwen3-moe": ("qwen3_moe", {"num_experts": 128, "num_experts_per_tok": 8, "output_router_logits": True}),
    "gemma3": ("gemma3_text", {"num_hidden_layers": 12, "layer_types": MIXED * 2}),
    "gpt2-xl": ("gpt2", {"n_embd": 1600, "n_layer": 48, "n_head": 25}),
    "falcon-multi-query": ("falcon", {"hidden_size": 4544, "num_attention_heads": 71, "multi_query": True}),
    "opt-350m": ("opt", {"hidden_size": 1024, "word_embed_proj_dim": 512, "num_attention_heads": 16}),
    "dbrx": (
        "dbrx",
        {
            "d_model": 6144,
            "n_heads": 48,
            "attn_config": {"clip_qkv": 8.0, "kv_n_heads": 8, "rope_theta": 500000.0},
            "ffn_config": {
                "ffn_hidden_size": 10752,
                "moe_num_experts": 16,
                "moe_top_k": 4,
                "hidden_size": 6144,
            },
        },
    ),
    "nemotron-h": (
        "nemotron_h",
        {"layers_block_type": (["linear_attention", "mlp"] * 4 + ["full_attention", "mlp"]) * 5},
    ),
    "bart-base": ("bart", {"d_model": 768, "decoder_layers": 6, "decoder_attention_heads": 12}),
    "smaller-than-small": (
        "llama",
        {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50},
    ),
}


@pytest.mark.parametrize("name", REAL)
def test_it_is_small_and_runs(name):
    family, values = REAL[name]
    config = CONFIG_MAPPING[family](**values)
    small = small_config(config)  # builds the model and runs it
    assert type(small) is type(config)
    assert small.vocab_size <= 99
    assert sum(p.numel() for p in empty_model(small).parameters()) < 150_000


def small(name):
    family, values = REAL[name]
    return small_config(CONFIG_MAPPING[family](**values))


def test_each_kind_of_block_is_kept_in_order():
    assert small("gemma3").layer_types == [*["sliding_attention"] * 3, "full_attention"]
    assert small("qwen2-sliding").layer_types == [*["full_attention"] * 3, "sliding_attention"]
    assert set(small("nemotron-h").layers_block_type) == {"linear_attention", "mlp", "full_attention"}
    assert small("smaller-than-small").num_hidden_layers == BLOCKS


def test_heads_of_keys_keep_their_proportion():
    llama = small("llama-3.1")
    assert (llama.num_attention_heads, llama.num_key_value_heads) == (4, 2)
    assert small_config(CONFIG_MAPPING["llama"](num_key_value_heads=1)).num_key_value_heads == 1
    assert small_config(CONFIG_MAPPING["llama"]()).num_key_value_heads == 4


def test_options_are_kept():
    assert small("qwen3-moe").output_router_logits
    assert small("llama-3.1").rope_parameters["rope_type"] == "llama3"
    assert small("phi-3-long").rope_parameters["long_factor"] == [2.0] * 4
    assert small_config(CONFIG_MAPPING["gpt2"](attn_pdrop=0.3)).attn_pdrop == 0.3
    assert small_config(CONFIG_MAPPING["bert"]()).is_decoder is False


def test_special_tokens_lie_in_the_vocabulary():
    llama = small("llama-3.1")
    assert max(llama.bos_token_id, *llama.eos_token_id) < llama.vocab_size


def test_a_family_is_small_without_dropout_and_a_decoder():
    assert small_family(CONFIG_MAPPING["gpt2"]).attn_pdrop == 0
    assert small_family(CONFIG_MAPPING["bert"]).is_decoder
    assert small_family(CONFIG_MAPPING["rwkv"], rescale_every=0).rescale_every == 0


def test_what_cannot_be_made_small_is_told():
    with pytest.raises(DstrainError, match=r"no small musicgen model|the defaults of musicgen are"):
        small_family(CONFIG_MAPPING["musicgen"])
    with pytest.raises(DstrainError, match="no causal language model"):
        small_config(CONFIG_MAPPING["t5"]())


def test_a_decoder_of_an_encoder_decoder_family_keeps_its_own_sizes():
    from dstrain.model.architecture import text_config

    config = text_config(CONFIG_MAPPING["bart"](decoder_layers=3, decoder_ffn_dim=64))
    assert (config.decoder_layers, config.decoder_ffn_dim) == (3, 64)
