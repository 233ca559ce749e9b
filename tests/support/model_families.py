"""Tiny configurations of many families, and the Hugging Face model with the same weights as our layers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig

VOCABULARY = 99
COMMON = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ROTARY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GQA = {**ROTARY, "head_dim": 8}
MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**ROTARY}),
    "llama-tied": ("llama", {**ROTARY, "tie_word_embeddings": True}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}),
    "gemma3_text": ("gemma3_text", {**GQA, "sliding_window": 4, "layer_types": MIXED}),
    "qwen2-sliding": (
        "qwen2",
        {**ROTARY, "use_sliding_window": True, "sliding_window": 4, "layer_types": MIXED},
    ),
    "qwen3": ("qwen3", {**GQA}),
    "bloom": ("bloom", {"hidden_size": 32, "n_layer": 4, "n_head": 4}),
    "falcon": ("falcon", {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}),
    "falcon-alibi": (
        "falcon",
        {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "alibi": True},
    ),
    "opt": (
        "opt",
        {
            "hidden_size": 32,
            "word_embed_proj_dim": 16,
            "ffn_dim": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
        },
    ),
    "granite": (
        "granite",
        {**ROTARY, "embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5},
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {
            **ROTARY,
            "num_key_value_heads": 4,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
        },
    ),
    "mixtral": ("mixtral", {**ROTARY, "num_local_experts": 4}),
    "qwen3_moe": (
        "qwen3_moe",
        {**GQA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    "gpt_neox": ("gpt_neox", {k: v for k, v in ROTARY.items() if k != "num_key_value_heads"}),
    "phi": ("phi", {**ROTARY}),
    "mistral": ("mistral", {**GQA, "sliding_window": 4}),
    "olmo2": ("olmo2", {**ROTARY}),
    "apertus": ("apertus", {**ROTARY}),  # its activations have learned slopes that only the constructor sets
}
NO_DROPOUT = ("resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout", "attention_dropout", "dropout")


def tiny(name: str, **changes: Any) -> PretrainedConfig:
    """The configuration of ``FAMILIES[name]``, without dropout."""
    kind, values = FAMILIES[name]
    config = CONFIG_MAPPING[kind](**{**COMMON, **values, **changes})
    for key in NO_DROPOUT:
        if hasattr(config, key) and key not in changes:
            setattr(config, key, 0.0)
    return config


def batch(rows: int = 2, length: int = 12) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """input_ids, position_ids, labels (shifted), weight (1 / label tokens)."""
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(5))
    labels = torch.cat([ids[:, 1:], torch.full((rows, 1), -100)], dim=1)
    weight = torch.tensor([1 / float((labels != -100).sum())])
    return ids, torch.arange(length).expand(rows, length).contiguous(), labels, weight


def reference(config: PretrainedConfig, layers: list[nn.Module]) -> nn.Module:
    """Hugging Face's own model with the layers' weights, in training mode."""
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)
    for layer in layers:
        for name, param in layer.named_parameters():
            model.get_parameter(name).data = param.detach().clone()
    model.tie_weights()
    return model.train()
