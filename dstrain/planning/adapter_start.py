"""``adapter.from``: a run that goes on from an adapter which PEFT or dstrain wrote."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from dstrain.config.json_reader import read_json
from dstrain.config.loader import ResolvedConfig, replace_values
from dstrain.config.origins import Origin
from dstrain.errors import DstrainError, way_out
from dstrain.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS, is_adapter_parameter, saved_name
from dstrain.planning.model_shape import ModelShape
from dstrain.strict_json import to_json

_SAME_NAME = ("r", "rank_pattern", "alpha_pattern", "target_parameters", "modules_to_save")
# What PEFT writes, and what does not change the adapter that is trained on.
_IDLE = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "inference_mode", "init_lora_weights"),
        *("loftq_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "revision"),
        *("runtime_config", "task_type"),
    }
)
_READ = frozenset(
    (*_SAME_NAME, "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "use_dora", "use_rslora")
)
_CHANGE_THE_MODEL = ("pissa", "olora", "loftq", "corda")
_HINT = "name a folder that PEFT's save_pretrained or `dstrain export` wrote"
_NOTHING: tuple[Any, ...] = (None, False, "none", [], {})


def follow_adapter(resolved: ResolvedConfig) -> ResolvedConfig:
    """The config with the options of the adapter that it starts from: a recipe's give way to them.

    Raises:
        DstrainError: there is no such adapter, it has options that dstrain does not train, or the user has chosen
            others.
    """
    adapter = resolved.config.adapter
    if adapter is None or adapter.start is None:
        return resolved
    folder = Path(adapter.start).expanduser().absolute()
    where = str(resolved.origin("adapter", "from"))
    read = _options(folder, where)
    now = adapter.model_dump()
    for key, value in read.items():
        origin = resolved.origin("adapter", key)
        named = ("adapter", key) in resolved.origins and origin.kind not in ("recipe", "default", "derived")
        if named and key == "dropout":
            continue
        if named and now[key] != value:
            raise DstrainError(
                f"adapter.{key} is {to_json(now[key])}, but {to_json(value)} in the adapter to start from",
                where=str(origin),
                hint=f"leave out {key}: the adapter's own is taken",
            )
        now[key] = value
    now["from"] = str(folder)
    return replace_values(resolved, {"adapter": now}, Origin("derived", f"{folder}/{ADAPTER_CONFIG}"))


def check_start(resolved: ResolvedConfig, shape: ModelShape) -> None:
    """Refuse an adapter to start from whose weights are not there, or are another model's. Raises DstrainError."""
    adapter = resolved.config.adapter
    if adapter is None or adapter.start is None:
        return
    path = Path(adapter.start) / ADAPTER_WEIGHTS
    hint = "the adapter is of another model, or its configuration and its weights do not belong together"
    found = _sizes(path)
    wanted = {
        saved_name(name): number
        for layer in shape.layers
        for name, number in layer.tensors.items()
        if is_adapter_parameter(name)
    }
    for name, number in wanted.items():
        have = found.pop(name, None)
        if have != number:
            what = "is missing" if have is None else f"has {have:,} values"
            raise DstrainError(
                f"the adapter's {name} {what}, and the model needs {number:,}", where=str(path), hint=hint
            )
    if odd := sorted(name for name in found if ".lora_" in name or ".modules_to_save." in name):
        raise DstrainError(f"the model has no place for the adapter's {odd[0]}", where=str(path), hint=hint)


def _options(folder: Path, where: str) -> dict[str, Any]:
    """An adapter's options in a folder, by the names of the config's section."""
    place = folder / ADAPTER_CONFIG
    if not place.is_file():
        raise DstrainError(
            f"{folder} is not an adapter folder (it has no {ADAPTER_CONFIG})", where=where, hint=_HINT
        )
    values = read_json(place, where=where).values
    if values.get("peft_type") != "LORA":
        raise DstrainError(
            f"this is an adapter of PEFT's type {values.get('peft_type')}, and dstrain trains LoRA, rsLoRA and DoRA",
            where=str(place),
            hint="merge it with PEFT, and train on with the merged model",
        )
    init = str(values.get("init_lora_weights", "")).lower()
    if init.startswith(_CHANGE_THE_MODEL):
        raise DstrainError(
            f"its initial values ({init}) have changed the model's own weights, which do not lie beside it",
            where=str(place),
            hint="save it with PEFT's path_initial_model_for_weight_conversion, as a plain LoRA adapter",
        )
    odd = [key for key, value in values.items() if key not in _READ | _IDLE and value not in _NOTHING]
    if odd:
        raise DstrainError(
            f"its {odd[0]} is {to_json(values[odd[0]])}, which dstrain does not train",
            where=str(place),
            hint="merge it into its model (`dstrain merge ADAPTER OUT`), and start from the result",
        )
    if values.get("use_dora") and values.get("use_rslora"):
        raise DstrainError(
            "it is an adapter of DoRA that is scaled as rsLoRA's, which dstrain does not train",
            where=str(place),
            hint="merge it into its model (`dstrain merge ADAPTER OUT`), and start from the result",
        )
    targets = values.get("target_modules")
    exclude = values.get("exclude_modules")
    return {
        "type": "dora" if values.get("use_dora") else "rslora" if values.get("use_rslora") else "lora",
        "alpha": values.get("lora_alpha", 8),
        "dropout": values.get("lora_dropout", 0.0),
        "targets": sorted(targets) if isinstance(targets, list) else targets or "all-linear",
        "exclude": sorted(exclude) if isinstance(exclude, list) else exclude or [],
        **{key: values[key] for key in _SAME_NAME if values.get(key) is not None},
    }


def _sizes(path: Path) -> dict[str, int]:
    """How many values each tensor of a safetensors file has, by its name. Raises DstrainError."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise DstrainError(f"{path.parent} has no {ADAPTER_WEIGHTS}", where=str(path), hint=_HINT)
    try:
        with safe_open(path, framework="numpy") as opened:
            names = opened.keys()
            return {name: math.prod(opened.get_slice(name).get_shape()) for name in names}
    except (SafetensorError, OSError) as error:
        hint = "download or copy the adapter again"
        raise DstrainError(
            f"the adapter's weights can't be read: {error}",
            where=str(path),
            hint=way_out(error, hint) if isinstance(error, OSError) else hint,
        ) from None
