"""The differences between two runs: config keys, and what was derived from them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from dstrain.config.loader import ResolvedConfig
from dstrain.config.values import leaves
from dstrain.errors import DstrainError
from dstrain.renamed_keys import CONFIG_KEYS, DATA_SUMMARY, with_new_names
from dstrain.runs.checkpoint.manifest import choose_newest, read_manifest, run_id
from dstrain.runs.run_folder import RunFolder

# Of a run itself, not of what it trains: two runs always differ in them.
_OF_THE_RUN = ("name", "runs_dir")
# What is compared of a plan beside DeepSpeed's keys; `layout`'s table of ranks follows from the rest of it.
_FOLLOWS: Mapping[str, tuple[str, ...]] = {
    "layout": ("hosts", "pipeline", "data_parallel", "schedule", "cut"),
    "batch": ("global_batch", "micro_batch", "accumulation", "seq_len"),
    "model": ("type", "parameters", "fingerprint"),
    "data": ("source", "fingerprint", "tokens", "train_rows", "validation_rows", "tokenizer"),
}


@dataclass(frozen=True)
class Value:
    """What a key is on one side, and the place that decided it; ``None`` on both where it is not there."""

    value: Any = None
    origin: str | None = None


@dataclass(frozen=True)
class Difference:
    """A key that is not the same on both sides. ``part``: config, deepspeed, layout, batch, model, data, versions."""

    part: str
    key: str
    a: Value
    b: Value


Side = Mapping[tuple[str, str], Value]
"""All that is compared of one side, by part and key."""


def chosen(resolved: ResolvedConfig) -> dict[tuple[str, str], Value]:
    """The side of a config alone."""
    values = {}
    for path, value in leaves(resolved.config.model_dump()):
        if path[0] not in _OF_THE_RUN and value != {}:
            values["config", ".".join(path)] = Value(value, str(resolved.origin(*path)))
    return values


def followed(folder: RunFolder, resolved: ResolvedConfig, name: str) -> dict[tuple[str, str], Value]:
    """The side of a run folder: its config with the origins that it had, its plan, and what its checkpoints say.

    Args:
        name: of its config.yaml, as places name it: both sides have one.

    Raises:
        DstrainError: its plan is damaged.
    """
    side = chosen(resolved)
    if not folder.plan.exists():
        return side
    try:
        plan = json.loads(folder.plan.read_text(encoding="utf-8"))
        for part, key in list(side):
            origin = with_new_names(plan["origins"], CONFIG_KEYS).get(key)
            if key.startswith("deepspeed."):
                origin = plan["deepspeed_origins"].get(key.removeprefix("deepspeed."))
            if origin:
                if origin.startswith(f"{folder.config.name}:"):
                    origin = name + origin.removeprefix(folder.config.name)
                side[part, key] = Value(side[part, key].value, origin)
        for path, value in leaves(plan["deepspeed"]):
            if value == {}:
                continue
            dotted = ".".join(path)
            side["deepspeed", dotted] = Value(value, plan["deepspeed_origins"].get(dotted))
        for part, keys in _FOLLOWS.items():
            for key in keys:
                side[part, key] = Value(with_new_names(plan[part], DATA_SUMMARY).get(key))
        side["layout", "accelerator"] = Value(plan["accelerator"])
        side["versions", "dstrain"] = Value(plan["dstrain"])
    except (KeyError, AttributeError, TypeError, ValueError):
        raise DstrainError(
            "this is not a plan",
            where=str(folder.plan),
            hint="the run folder is damaged: compare its config.yaml",
        ) from None
    newest = choose_newest(folder.checkpoints, run_id(folder.run_id, folder.checkpoints)).checkpoint
    if newest is not None:
        with suppress(OSError, ValueError):  # a run that trains may have removed it meanwhile
            for name, version in read_manifest(newest).get("versions", {}).items():
                side["versions", name] = Value(version)
    return side


def differences(a: Side, b: Side) -> list[Difference]:
    """Every key that differs; of a part that only one side can tell of, none."""
    told_by_both = {part for part, _ in a} & {part for part, _ in b}
    found = []
    for part, key in dict.fromkeys([*a, *b]):
        of_a, of_b = a.get((part, key), Value()), b.get((part, key), Value())
        one_is_silent = ((part, key) in a) != ((part, key) in b)
        if part not in told_by_both or (one_is_silent and part == "versions"):
            continue
        if one_is_silent or of_a.value != of_b.value:
            found.append(Difference(part, key, of_a, of_b))
    return found
