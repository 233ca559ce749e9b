"""An adapter's section of the config, and the names of its parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dstrain.config.loader import load_config
from dstrain.lora import base_name, is_adapter_parameter, saved_name

_Q = "model.layers.0.self_attn.q_proj"
_EXPERTS = "model.layers.0.mlp.experts"


@pytest.mark.parametrize(
    ("name", "base"),
    [
        (f"{_Q}.weight", f"{_Q}.weight"),
        (f"{_Q}.base_layer.weight", f"{_Q}.weight"),
        (f"{_EXPERTS}.base_layer.base_layer.down_proj", f"{_EXPERTS}.down_proj"),
        ("lm_head.original_module.weight", "lm_head.weight"),
        ("model.layers.0.lora_A.speech.weight", "model.layers.0.lora_A.speech.weight"),  # a family's own
    ],
)
def test_a_base_parameter_has_its_hugging_face_name(name: str, base: str) -> None:
    assert base_name(name) == base
    assert not is_adapter_parameter(name)


@pytest.mark.parametrize(
    ("name", "saved"),
    [
        (f"{_Q}.lora_A.default.weight", f"{_Q}.lora_A.weight"),
        (f"{_Q}.lora_magnitude_vector.default.weight", f"{_Q}.lora_magnitude_vector"),
        ("model.embed_tokens.lora_embedding_B.default", "model.embed_tokens.lora_embedding_B"),
        ("lm_head.modules_to_save.default.weight", "lm_head.weight"),
        (f"{_EXPERTS}.base_layer.lora_A.default.weight", f"{_EXPERTS}.base_layer.lora_A.weight"),
    ],
)
def test_an_adapters_parameter_keeps_its_name_and_is_saved_under_pefts(name: str, saved: str) -> None:
    assert is_adapter_parameter(name)
    assert base_name(name) == name
    assert saved_name(name) == f"base_model.model.{saved}"


@pytest.mark.parametrize(
    ("text", "flags", "found"),
    [
        ("adapter: dora", {}, ("dora", 8, 8)),
        ("adapter: {type: rslora, r: 4}", {}, ("rslora", 4, 8)),
        ("adapter: {r: 4}", {"adapter": "dora"}, ("dora", 4, 8)),
        ("adapter: dora", {"adapter_r": 2, "adapter_alpha": 32.0}, ("dora", 2, 32)),
        ("lr: 0.1", {"adapter_r": 2}, ("lora", 2, 8)),
        ("recipe: sft-lora", {}, ("lora", 16, 32)),
        ("recipe: sft-lora\nadapter: dora", {}, ("dora", 16, 32)),
        ("recipe: sft-lora", {"adapter": "none"}, None),
        ("adapter: none", {}, None),
        ("adapter: lora", {"adapter": None}, None),
    ],
)
def test_its_short_form_and_its_flags_set_one_key(
    text: str, flags: dict[str, Any], found: tuple[Any, ...] | None, tmp_path: Path
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text + "\n")
    adapter = load_config(config_file=str(path), flags=flags).config.adapter
    assert (None if adapter is None else (adapter.type, adapter.r, adapter.alpha)) == found


def test_the_config_is_written_and_read_again(tmp_path: Path) -> None:
    resolved = load_config(
        settings=["adapter={type: dora, rank_pattern: {q_proj: 2}}"], flags={"adapter_r": 4}
    )
    assert str(resolved.origin("adapter", "r")) == "--adapter-r"
    path = tmp_path / "config.yaml"
    path.write_text(resolved.to_yaml())
    assert load_config(config_file=str(path)).config == resolved.config
