"""Builds a small model of a family, to test what the family does.

What a model *is* stays: the family, the kinds of its blocks, its attention, its options. What only makes it large
shrinks: widths, heads, experts, vocabulary, and the number of blocks to four, chosen so that each kind is
among them. Sizes are found by the names that configurations give them, in ``small_sizes``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import PretrainedConfig

from dstrain.errors import DstrainError
from dstrain.model.architecture import text_config
from dstrain.model.capability.small_sizes import (
    BLOCKS,
    DEPTH,
    GROUPED,
    HEAD,
    HEADS,
    LEFT_OPEN,
    LIMITS,
    OVERRIDES,
    QUERIES,
    SIZES,
    VOCABULARY,
)
from dstrain.model.initialise import materialise
from dstrain.model.skeleton import empty_model

LARGEST = 2_000_000
"""Parameters above which a size was overlooked: the result would not be small."""

RANDOM = (
    *("dropout", "dropout_prob", "dropout_rate", "pdrop", "layerdrop", "dropout_p", "drop_path_rate"),
    *("jitter_noise", "jitter_eps", "mask_time_prob"),
)
"""How the names end of what makes a training forward random."""

NOT_SIZES = (
    *("transformers_version", "architectures", "_name_or_path", "dtype", "id2label", "label2id"),
    "output_attentions",  # always written, and refused inside of dbrx by transformers 5.17
)


def small_config(config: PretrainedConfig) -> PretrainedConfig:
    """A small copy of ``config``: the same kind of model with a few thousand parameters.

    Args:
        config: of a causal language model; of a multimodal one its text model is taken.

    Returns:
        A configuration with four blocks, a vocabulary of at most 99 and special tokens inside it, whose
        model was built and run.

    Raises:
        DstrainError: no small values were found with which the model builds and runs; says what the first
            try ran into.
    """
    config = text_config(config)
    return _smallest(type(config), config.to_dict())


def _smallest(config_class: type[PretrainedConfig], values: dict[str, Any]) -> PretrainedConfig:
    first: Exception | None = None
    for attempt in _attempts(values):
        try:
            small = config_class(**attempt)
            _try_out(small)
        except Exception as error:  # families raise what they like for values that do not fit together
            first = first or error
        else:
            return small
    reason = first.message if isinstance(first, DstrainError) else f"{type(first).__name__}: {first}"
    text = " ".join(reason.split())[:200]
    raise DstrainError(f"no small {config_class.model_type} model could be made: {text}") from first


def small_family(config_class: type[PretrainedConfig], **choices: Any) -> PretrainedConfig:
    """``small_config`` of a family's defaults, as a decoder and without dropout.

    Args:
        choices: values of the configuration that shall be others than the family's defaults.

    Raises:
        DstrainError: as ``small_config``; or the family's defaults are not valid.
    """
    try:
        config = text_config(_defaults(config_class))
    except DstrainError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        raise DstrainError(f"the defaults of {config_class.model_type} are not valid: {text}") from error
    values = _merged(config.to_dict(), LEFT_OPEN.get(config.model_type, {}))
    values = _calm(values)
    if hasattr(config, "is_decoder"):
        values["is_decoder"] = True  # otherwise each token would see those after it
    return _smallest(type(config), {**values, **choices})


def _calm(values: dict[str, Any]) -> dict[str, Any]:
    """``values``, and those inside them, without dropout and its like."""
    calm = {name: _calm(value) if isinstance(value, dict) else value for name, value in values.items()}
    return calm | {n: 0.0 for n, v in calm.items() if str(n).endswith(RANDOM) and isinstance(v, float) and v}


def _defaults(config_class: type[PretrainedConfig]) -> PretrainedConfig:
    try:
        return config_class()
    except Exception:  # not valid by themselves
        return config_class(**LEFT_OPEN.get(config_class.model_type, {}))


def _merged(values: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """``values`` with ``more`` put over them, in nested dictionaries too."""
    nested = {n: _merged(values[n], v) for n, v in more.items() if isinstance(v, dict) and values.get(n)}
    return {**values, **more, **nested}


def _attempts(values: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Values to build the small configuration from, the most faithful first."""
    values = shrunk(values)
    # A head's width is mostly given by the model's; a few families compute kinds of blocks by themselves.
    for dropped in ((), ("head_dim",), ("layer_types",), ("head_dim", "layer_types")):
        if all(name in values for name in dropped):
            yield {name: value for name, value in values.items() if name not in dropped}


def shrunk(values: dict[str, Any], around: dict[str, Any] | None = None) -> dict[str, Any]:
    """The values of a configuration, and of those inside it, with small sizes.

    Args:
        around: the values of the configuration that this one is a part of.
    """
    around = {**(around or {}), **values}
    depth = _depth(values)
    kept = _blocks_to_keep(values, depth)
    small = {name: _size(name, value, around) for name, value in values.items() if name not in NOT_SIZES}
    for name, value in small.items():
        if isinstance(value, list) and len(value) == depth and depth > 1:
            small[name] = [value[i] for i in kept]
        elif isinstance(value, dict) and name.endswith("_config") and name != "per_layer_config":
            small[name] = shrunk(value, around)
    if "per_layer_config" in values:
        small["per_layer_config"] = _per_layer(values, small, kept)
    head = _head_width(small)
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(small.get(name), dict):
            small[name] = _rope(small[name], head)
    last = small.get("vocab_size", VOCABULARY) - 1
    for name, value in small.items():
        if name.endswith("_token_id") and value is not None:
            small[name] = [min(v, last) for v in value] if isinstance(value, list) else min(value, last)
    return small | OVERRIDES.get(values.get("model_type", ""), {})


def _size(name: str, value: Any, values: dict[str, Any]) -> Any:
    if name in GROUPED and isinstance(value, int):
        queries = next((values[q] for q in QUERIES if isinstance(values.get(q), int)), value)
        return HEADS if value >= queries else 1 if value == 1 else HEADS // 2
    if name == "head_dim" and value == values.get("qk_rope_head_dim"):
        return SIZES["qk_rope_head_dim"]
    if (
        name in ("head_dim", "qk_head_dim")
        and values.get("qk_rope_head_dim")
        and values.get("qk_nope_head_dim")
    ):
        return SIZES["qk_rope_head_dim"] + SIZES["qk_nope_head_dim"]
    if isinstance(value, list) and all(type(v) is int for v in value):
        return [_size(name, v, values) for v in value]
    if type(value) is not int or value <= 0:
        return value
    return min(value, LIMITS[name]) if name in LIMITS else SIZES.get(name, value)


def _depth(values: dict[str, Any]) -> int | None:
    for name in DEPTH:
        if isinstance(found := values.get(name), int):
            return found
    kinds = values.get("layers_block_type")
    return len(kinds) if kinds else None


def _blocks_to_keep(values: dict[str, Any], depth: int | None) -> list[int]:
    """Indices of four blocks, in order, the first of each kind among them."""
    if depth is None or depth < 2:
        return list(range(BLOCKS))
    lists = [v for v in values.values() if isinstance(v, list) and len(v) == depth]
    first: dict[str, int] = {}
    for i in range(depth):
        first.setdefault(repr([v[i] for v in lists]), i)
    kept = set(list(first.values())[:BLOCKS])
    for i in range(depth):
        if len(kept) < BLOCKS:
            kept.add(i)
    # A model of fewer blocks gets its last one several times.
    return (sorted(kept) + [depth - 1] * BLOCKS)[:BLOCKS]


def _per_layer(values: dict[str, Any], small: dict[str, Any], kept: list[int]) -> dict[int, dict[str, Any]]:
    """What single blocks have otherwise than the rest, in the same proportion."""
    found = {int(i): changes for i, changes in (values["per_layer_config"] or {}).items()}
    return {
        new: {
            name: small[name] * value // values[name]
            if type(value) is int and type(values.get(name)) is int and values[name]
            else value
            for name, value in found[old].items()
        }
        for new, old in enumerate(kept)
        if old in found
    }


def _head_width(small: dict[str, Any]) -> int:
    for name in ("qk_rope_head_dim", "head_dim"):
        if isinstance(found := small.get(name), int):
            return found
    return HEAD


def _rope(values: dict[str, Any], head: int) -> dict[str, Any]:
    """Rotary tables list a factor for each pair of a head's elements; some have a set for each kind of block."""
    small = dict(values)
    pairs = max(int(head * (values.get("partial_rotary_factor") or 1.0)) // 2, 1)
    for name, value in values.items():
        if isinstance(value, dict):
            small[name] = _rope(value, head)
        elif name in ("long_factor", "short_factor") and isinstance(value, list):
            small[name] = value[:pairs]
        elif name == "mrope_section" and isinstance(value, list):
            # Shared out among time, height and width, the first taking what is left.
            each = pairs // len(value)
            small[name] = [pairs - each * (len(value) - 1)] + [each] * (len(value) - 1)
    return small


@torch.no_grad()
def _try_out(config: PretrainedConfig) -> None:
    """Build the model and run it on a few tokens.

    Raises:
        Exception: whatever the family's code ran into.
    """
    model = empty_model(config)
    parameters = sum(p.numel() for p in model.parameters())
    if parameters > LARGEST:
        raise DstrainError(f"{parameters} parameters are not small")
    materialise(model)
    for parameter in model.parameters():
        parameter.fill_(0.02)
    model.eval()(input_ids=torch.arange(12).repeat(2, 1) % model.config.vocab_size, use_cache=False)
