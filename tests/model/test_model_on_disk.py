"""Exported names and values are those of transformers' own save_pretrained, for families that convert and tie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PretrainedConfig

from dstrain.model.weights.on_disk import OnDisk, refused_keys

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GPT2 = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}
EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8}
ROUTED = {
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}

# Tied and untied; experts fused in memory; renamed keys; persistent buffers; another word for "layers".
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama tied": ("LlamaConfig", SMALL | {"tie_word_embeddings": True}),
    "llama untied": ("LlamaConfig", SMALL | {"tie_word_embeddings": False}),
    "gpt2": ("GPT2Config", GPT2),
    "bloom": ("BloomConfig", {"vocab_size": 96, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "mpt": ("MptConfig", {"vocab_size": 96, "d_model": 32, "n_layers": 2, "n_heads": 4}),
    "gemma3": ("Gemma3TextConfig", SMALL | {"head_dim": 8}),
    "mixtral": ("MixtralConfig", SMALL | {"num_local_experts": 4}),
    "qwen3_moe tied": ("Qwen3MoeConfig", SMALL | EXPERTS | {"tie_word_embeddings": True}),
    "deepseek_v3": (
        "DeepseekV3Config",
        SMALL | LATENT | ROUTED | {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_key_value_heads": 4},
    ),
    "ernie4_5_moe": ("Ernie4_5_MoeConfig", SMALL | {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16}),
    "granitemoe": ("GraniteMoeConfig", SMALL | {"num_local_experts": 4}),
    "jamba": ("JambaConfig", SMALL | {"num_experts": 4, "mamba_d_state": 4}),
    "gpt_oss": ("GptOssConfig", SMALL | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}),
}  # fmt: skip
CONVERTED = {"mixtral", "qwen3_moe tied", "deepseek_v3", "ernie4_5_moe", "granitemoe", "jamba"}


def config_of(family: str) -> PretrainedConfig:
    name, options = FAMILIES[family]
    return getattr(transformers, name)(**options)


@pytest.mark.parametrize("family", FAMILIES)
def test_part_by_part_it_is_what_save_pretrained_writes(family: str, tmp_path: Path) -> None:
    config = config_of(family)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    held = model.state_dict()

    ours = OnDisk(config)
    assert len(ours.parts) == config.num_hidden_layers + 1
    with safe_open(tmp_path / "model.safetensors", framework="pt") as written:
        assert set(ours.files) == set(written.keys())
        assert (set(ours.files) != set(ours.tensors)) == (family in CONVERTED), "what this family is to show"
        for part in ours.parts:
            for name, tensor in ours.convert({key: held[key] for key in part}).items():
                assert torch.equal(tensor, written.get_tensor(name)), name
                assert ours.files[name].shape == tensor.shape and ours.files[name].dtype == tensor.dtype
    assert not refused_keys(config, ours.files)


@pytest.mark.parametrize("family", ["llama tied", "qwen3_moe tied", "deepseek_v3"])
def test_keys_that_from_pretrained_would_not_take_are_named(family: str) -> None:
    config = config_of(family)
    files = dict(OnDisk(config).files)
    name = next(name for name in files if "norm" in name)
    assert refused_keys(config, files | {"stray.weight": files[name]}) == [
        "stray.weight belongs to no parameter"
    ]
    bent = files | {name: torch.empty(7, device="meta")}
    assert len(refused_keys(config, bent)) == 1 and name in refused_keys(config, bent)[0]
    files.pop(name)
    assert refused_keys(config, files) == [f"{name} is missing"]


def test_what_the_family_fixes_keeps_its_type() -> None:
    ours = OnDisk(config_of("deepseek_v3"), torch.bfloat16)
    types = {name.rpartition(".")[2]: tensor.dtype for name, tensor in ours.files.items()}
    assert types["e_score_correction_bias"] == torch.float32 and types["weight"] == torch.bfloat16


def test_names_of_the_files_that_it_started_from_are_kept() -> None:
    """A text model out of a multimodal checkpoint: its family drops a prefix in memory."""
    config = transformers.Qwen3_5TextConfig(**SMALL, head_dim=8, layer_types=["full_attention"] * 2)
    newest = OnDisk(config).files
    assert not any("language_model" in name for name in newest)
    older = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in newest.items()}
    kept = OnDisk(config, like=older | {"model.visual.patch.weight": torch.empty(3, device="meta")})
    assert kept.files.keys() == older.keys() != newest.keys()
    assert not refused_keys(config, kept.files)
