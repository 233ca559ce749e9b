"""The sizes of a small model, by the names used in model configurations.

A table, no code: a family whose values must fit together in its own way gets a line here.
"""

from __future__ import annotations

from typing import Any

BLOCKS = 4
VOCABULARY = 99

WIDTH, INNER, HEADS, HEAD = 32, 64, 4, 8  # 32 = 4 x 8, for families that compute one from the others


def _all(value: int, names: str) -> dict[str, int]:
    return dict.fromkeys(names.split(), value)


SIZES: dict[str, int] = {
    **_all(WIDTH, "hidden_size n_embd d_model dim dim_model emb_dim n_embed embedding_size embedding_dim"),
    **_all(WIDTH, "embed_dim word_embed_proj_dim input_embedding_size output_embedding_size lru_width"),
    **_all(WIDTH, "attention_hidden_size decoder_hidden_size hidden_size_global backbone_hidden_size"),
    **_all(WIDTH, "ple_embed_dim pronunciation_embed_dim shape_embed_dim"),
    **_all(
        INNER, "intermediate_size ffn_dim n_inner d_ff dff dim_ff decoder_ffn_dim encoder_ffn_dim d_inner"
    ),
    **_all(
        INNER, "ffn_hidden_size mlp_hidden_size dense_intermediate_size intermediate_size_mlp mamba_d_ssm"
    ),
    **_all(INNER, "feed_forward_size"),
    **_all(16, "moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size"),
    **_all(
        16, "moe_shared_expert_intermediate_size shared_intermediate_size shared_experts_intermediate_size"
    ),
    **_all(16, "moe_latent_size router_hidden_size mamba_d_head mamba_head_dim mamba_headdim"),
    **_all(HEADS, "num_attention_heads n_head n_heads num_heads decoder_attention_heads"),
    **_all(HEADS, "encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads"),
    **_all(
        HEADS, "swa_num_attention_heads mamba_n_heads mamba_num_heads n_mamba_heads linear_num_value_heads"
    ),
    **_all(HEADS, "linear_num_heads"),
    **_all(2, "linear_num_key_heads index_n_heads indexer_n_heads"),
    **_all(
        HEAD, "head_dim attention_head_dim attention_head_size d_head dim_head d_kv kv_channels v_head_dim"
    ),
    **_all(HEAD, "global_head_dim swa_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim"),
    **_all(HEAD, "qk_nope_head_dim index_head_dim indexer_head_dim kv_lora_rank q_lora_rank hc_lowrank"),
    **_all(HEAD, "hidden_size_per_layer_input"),
    **_all(4, "qk_rope_head_dim rotary_dim laurel_rank adapter_rank o_lora_rank"),
    **_all(HEAD, "mamba_d_state ssm_state_size state_size mamba_chunk_size chunk_size mamba_dt_rank"),
    **_all(4, "time_step_rank"),
    **_all(BLOCKS, "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers"),
}
"""The small value of each size, by its name. A size that a configuration leaves open (None) stays open."""

LIMITS: dict[str, int] = {
    **_all(4, "num_experts num_local_experts n_routed_experts moe_num_experts zero_expert_num"),
    **_all(2, "num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k top_k_experts"),
    **_all(1, "n_group topk_group num_expert_group n_shared_experts first_k_dense_replace num_dense_layers"),
    **_all(64, "max_position_embeddings n_positions model_max_length max_sequence_length n_ctx max_seq_len"),
    **_all(64, "max_target_positions max_source_positions original_max_position_embeddings"),
    **_all(8, "sliding_window sliding_window_size attention_window window_size attention_window_size"),
    **_all(8, "index_topk rel_extent"),
    **_all(VOCABULARY, "vocab_size vocab_size_per_layer_input decoder_vocab_size shape_vocab_size"),
    **_all(VOCABULARY, "pronunciation_vocab_size encoder_hash_byte_group_vocab ngram_vocab_size_base"),
    **_all(2, "encoder_layers num_encoder_layers num_layers_per_stack rescale_every"),
}
"""Counts that are small from this value down."""

QUERIES = "num_attention_heads", "n_head", "n_heads", "num_heads"
GROUPED = "num_key_value_heads", "num_kv_heads", "n_head_kv", "kv_n_heads", "swa_num_key_value_heads"
"""Heads of keys and values: as many as queries, one for all, or something between, as before."""

DEPTH = "num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers"

ROTARY = {"partial_rotary_factor": 1.0, "rope_theta": 10000.0, "rope_type": "default"}

OVERRIDES: dict[str, dict[str, Any]] = {
    "dots3_note_text": {"head_dim": 16, "qk_nope_head_dim": 12},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16},
    # Two blocks with caches of their own, one of each kind, then two that look into those.
    "gemma3n_text": {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2},
    # As long as the text model's list of blocks, the vision model's would be taken for it.
    "git_vision_model": {"num_hidden_layers": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 2},
    "nemotron_h": {"n_groups": 2},
    "phi4_multimodal_audio": {
        "num_blocks": 1,
        "ext_pw_out_channel": 32,
        "depthwise_separable_out_channel": 32,
        "nemo_conv_channels": 32,
        "input_size": 16,
    },
    "reformer": {
        "hash_seed": 0,
        "axial_pos_embds": False,
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
    },
    "xlstm": {"num_blocks": BLOCKS},
    # The attention of all hybrid blocks is one and the same.
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
}
"""By ``model_type``: values that must fit together in ways that the names do not tell."""

LEFT_OPEN: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROTARY}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "nemotron": {"num_key_value_heads": 8},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "xmod": {"default_language": "en_XX"},
}
"""By ``model_type``: what a family's defaults leave open, though its model does not run without."""
