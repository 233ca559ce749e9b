"""A model of the same family, reduced until a laptop trains it in seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dstrain.config.files import model_config_file
from dstrain.config.loader import ResolvedConfig
from dstrain.errors import DstrainError
from dstrain.files import write_json

# Sizes by the names that Hugging Face configs use for them; a name that is not there stays away.
_SIZES = {
    "num_hidden_layers": 6, "n_layer": 6, "num_layers": 6, "n_layers": 6,
    "hidden_size": 64, "n_embd": 64, "d_model": 64,
    "intermediate_size": 128, "ffn_dim": 128, "n_inner": 128, "ffn_hidden_size": 128, "moe_intermediate_size": 64,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip


def shrink_model(resolved: ResolvedConfig, folder: Path) -> Path:
    """Write ``config.json`` of the shrunk model into ``folder``, and return that.

    The vocabulary stays, since the data are tokenised with it. Whether the family can be built so is
    found out when it is measured.
    """
    source = model_config_file(resolved.config.model, where=str(resolved.origin("model")))
    try:
        config: dict[str, Any] = json.loads(source.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not a JSON object")
    except ValueError as error:
        raise DstrainError(f"not a model's config: {error}", where=str(source)) from None
    for key, size in _SIZES.items():
        if isinstance(config.get(key), int):
            config[key] = min(size, config[key])
    blocks = next((config[key] for key in _SIZES if key in config), 6)
    for key, value in config.items():
        if key == "layer_types" and isinstance(value, list):
            config[key] = value[:blocks]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    return folder
