"""Loads the Hugging Face configuration of a causal language model from a folder or JSON file."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig

from dstrain.errors import DstrainError, way_out
from dstrain.files import parse_json
from dstrain.model_config_bounds import LARGEST_FILE, refuse_sizes


def load_config(source: str | Path) -> PretrainedConfig:
    """Read the configuration of a causal language model.

    Args:
        source: a folder that holds ``config.json``, or the path of such a JSON file.

    Returns:
        The configuration of the text model: of a multimodal model its ``get_text_config()``, where that is a
        causal language model by itself.

    Raises:
        DstrainError: file missing or unreadable, malformed JSON, unknown ``model_type``, values that the
            family's configuration class refuses, or a family without a causal language model.
    """
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    config = _parse(_read(path), where=str(path))
    return text_config(config, where=str(path))


def text_config(config: PretrainedConfig, *, where: str | None = None) -> PretrainedConfig:
    """The part of ``config`` that describes a causal language model over text.

    Raises:
        DstrainError: neither the configuration nor its text part has a causal language model.
    """
    text = config.get_text_config(decoder=True)
    if type(text) is type(config):
        text = config  # of bart and its like it is a copy that has lost the decoder's sizes
    if type(text) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return text
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return config
    raise DstrainError(
        f"model_type {config.model_type!r} has no causal language model in transformers",
        hint="dstrain trains decoder-only language models, e.g. llama, qwen3, gemma3_text, gpt2",
        where=where,
    )


def canonical_config(config: PretrainedConfig) -> PretrainedConfig:
    """A copy of ``config`` with all that is not asked of the model's own forward switched off.

    These are caches and recorded outputs; a router loss is made in ``dstrain.model.router``.
    """
    config = copy.deepcopy(config)
    for name in ("use_cache", "output_attentions", "output_hidden_states", "output_router_logits"):
        if hasattr(config, name):
            setattr(config, name, False)
    if hasattr(config, "return_dict"):
        config.return_dict = True
    return config


_ONE_OBJECT = (
    'a config.json is one JSON object, {"model_type": "llama", ...}: get it again from where the model is from'
    " (`dstrain export` writes it for a run)"
)


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise DstrainError(
                f"the model configuration has {path.stat().st_size / 1e6:,.0f} MB, and the limit is"
                f" {LARGEST_FILE / 1e6:.0f}",
                hint="check that this is the right file",
                where=str(path),
            )
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DstrainError(
            "no such model configuration",
            hint="give a folder that holds config.json, or the path of a config JSON file",
            where=str(path),
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DstrainError(
            f"the model configuration cannot be read: {reason}",
            where=str(path),
            hint=way_out(error) if isinstance(error, OSError) else "save it as UTF-8",
        ) from None
    try:
        values = parse_json(text)
    except json.JSONDecodeError as error:
        raise DstrainError(
            f"malformed JSON: {error.msg}", where=f"{path}:{error.lineno}", hint=_ONE_OBJECT
        ) from None
    except ValueError as error:
        raise DstrainError(f"malformed JSON: {error}", where=str(path), hint=_ONE_OBJECT) from None
    if not isinstance(values, dict):
        raise DstrainError(
            f"expected a JSON object, found {type(values).__name__}", where=str(path), hint=_ONE_OBJECT
        )
    refuse_sizes(values, where=str(path))
    return values


def _without_attention(values: dict[str, Any]) -> dict[str, Any]:
    """Without the attention implementation that some files name: the run's key ``attention`` chooses it."""
    named = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
    return {
        key: _without_attention(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if key not in named
    }


def _parse(values: dict[str, Any], *, where: str) -> PretrainedConfig:
    kind = values.get("model_type")
    if not isinstance(kind, str):
        raise DstrainError(
            "the configuration has no model_type", hint='for example "model_type": "llama"', where=where
        )
    if kind not in CONFIG_MAPPING:
        import difflib

        near = difflib.get_close_matches(kind, list(CONFIG_MAPPING.keys()), n=1)
        custom = " Models with their own code (auto_map) are not supported." if "auto_map" in values else ""
        raise DstrainError(
            f"unknown model_type {kind!r}: this version of transformers does not have it.{custom}",
            hint=f"did you mean {near[0]!r}?" if near else "a newer version of transformers may have it",
            where=where,
        )
    try:
        return CONFIG_MAPPING[kind].from_dict(_without_attention(values))
    except Exception as error:  # each family's class checks its values with its own exception types
        text = " ".join(str(error).split())
        raise DstrainError(
            f"the {kind} configuration is refused: {text}",
            where=where,
            hint=f"compare it with the config.json of a {kind} model on the hub",
        ) from error
