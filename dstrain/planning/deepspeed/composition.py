"""Composes the DeepSpeed JSON from the fragments in ``ds_configs/``, with the origin of each key.

A fragment is DeepSpeed JSON in which ``"$name"`` stands for a value that the plan derives. What the
user lays on top (``deepspeed:`` or ``--ds-config``) may add keys and change those that are free to
tune; a key that a choice of dstrain's decides can't be changed behind its back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dstrain.config.deepspeed_keys import canonical, what_is_wrong
from dstrain.config.files import ds_configs
from dstrain.config.loader import ResolvedConfig
from dstrain.config.nested import KeyPath, leaves
from dstrain.errors import DstrainError
from dstrain.planning.deepspeed.user_keys import OwnKey, mistakes, own_keys

# DeepSpeed keys that a run-config key decides: changing them elsewhere would break the plan's word.
OWNED: dict[KeyPath, str] = {
    ("train_batch_size",): "global_batch",
    ("train_micro_batch_size_per_gpu",): "micro_batch",
    ("gradient_accumulation_steps",): "micro_batch",
    ("gradient_clipping",): "gradient_clipping",
    ("zero_optimization", "stage"): "zero",
    ("zero_optimization", "offload_optimizer"): "offload",
    ("zero_optimization", "offload_param"): "offload",
    ("fp16", "enabled"): "precision",
    ("bf16", "enabled"): "precision",
    ("data_types",): "precision",
    ("torch_autocast",): "precision",
    ("optimizer",): "optimizer",
    ("pipeline",): "pipeline",
    ("scheduler",): "lr_schedule",
}


@dataclass(frozen=True)
class Derived:
    """A value that stands for ``$name`` in a fragment, and why it is so."""

    value: Any
    origin: str


@dataclass(frozen=True)
class DeepSpeedConfig:
    """The composed JSON and the origin of each leaf."""

    values: dict[str, Any]
    origins: dict[KeyPath, str]


def compose(
    fragments: Sequence[str], derived: Mapping[str, Derived], resolved: ResolvedConfig
) -> DeepSpeedConfig:
    """Put the fragments together, fill in the derived values, lay the user's keys on top.

    Args:
        fragments: names below ``ds_configs/`` without ``.json``, later ones over earlier ones.
        derived: the value and reason of each ``$name``.
        resolved: the run config, whose ``ds_config`` file and ``deepspeed`` mapping are laid on top.

    Raises:
        DstrainError: the user's file can't be read, a key is wrong, or contradicts the plan.
    """
    for mistake in mistakes(resolved):
        raise mistake
    composed = _from_fragments(fragments, derived)
    for key in own_keys(resolved):
        _lay_on_top(key, composed, resolved)
    return composed


def contradictions(
    fragments: Sequence[str],
    derived: Mapping[str, Derived],
    resolved: ResolvedConfig,
    undecided: Sequence[KeyPath],
) -> list[DstrainError]:
    """Every one of the user's keys that contradicts the plan, but for those that are not decided yet.

    Keys that are wrong in themselves, and a file that can't be read, are not among them: see `mistakes`.
    """
    try:
        keys = list(own_keys(resolved))
    except DstrainError:
        return []
    if not keys:
        return []
    composed, found = _from_fragments(fragments, derived), []
    for key in keys:
        if canonical(key.path) in undecided or what_is_wrong(key.path, key.value):
            continue
        try:
            _lay_on_top(key, composed, resolved)
        except DstrainError as error:
            found.append(error)
    return found


def owner_of(path: KeyPath) -> str | None:
    """The run-config key that decides this key of DeepSpeed's, if one does."""
    return next((OWNED[path[:n]] for n in range(1, len(path) + 1) if path[:n] in OWNED), None)


def _from_fragments(fragments: Sequence[str], derived: Mapping[str, Derived]) -> DeepSpeedConfig:
    values: dict[str, Any] = {}
    origins: dict[KeyPath, str] = {}
    for name in fragments:
        fragment = json.loads((ds_configs() / f"{name}.json").read_text(encoding="utf-8"))
        for path, value in leaves(fragment):
            origin = f"ds_configs/{name}.json"
            if isinstance(value, str) and value.startswith("$"):
                chosen = derived[value[1:]]
                value, origin = chosen.value, chosen.origin
            _set(values, path, value)
            origins[path] = origin
    return DeepSpeedConfig(values, origins)


def _lay_on_top(key: OwnKey, composed: DeepSpeedConfig, resolved: ResolvedConfig) -> None:
    """Put one of the user's keys into the JSON. Raises DstrainError if it contradicts the plan."""
    if key.value == "auto":  # Hugging Face's word for "as derived"; DeepSpeed would drop it silently
        return
    path = canonical(key.path)
    if not _is_decided(path, key.value, key.place, composed.values, resolved):
        _set(composed.values, path, key.value)
        composed.origins[path] = key.place


def _is_decided(
    path: KeyPath, value: Any, origin: str, values: Mapping[str, Any], resolved: ResolvedConfig
) -> bool:
    """Whether the plan has decided this key, and as the user says. Raises DstrainError if otherwise.

    An owned key may be repeated, not changed, nor may what holds one be replaced.
    """
    dotted = ".".join(path)
    decided: Any = values
    for key in path:
        decided = decided.get(key) if isinstance(decided, dict) else None
    if isinstance(decided, dict) and not isinstance(value, dict):
        raise DstrainError(
            f"{dotted} must be a block of keys, not {json.dumps(value)}",
            where=origin,
            hint=f"{dotted}: {{{next(iter(decided), 'KEY')}: ...}} changes a single key",
        )
    if value == {} and isinstance(decided, dict):
        return True
    owner = owner_of(path)
    if owner is None:
        return False
    if decided is not None and decided == value:
        return True
    choice = f"{owner} = {getattr(resolved.config, owner)} ({resolved.origin(owner)})"
    if decided is None:
        reason = f"{dotted} = {json.dumps(value)} can't be set in DeepSpeed's JSON: {choice} decides it"
    else:
        reason = (
            f"{dotted} = {json.dumps(value)} contradicts {json.dumps(decided)}, which follows from {choice}"
        )
    raise DstrainError(
        reason, where=origin, hint=f"remove {dotted} and set {owner} instead (--set {owner}=..., or in YAML)"
    )


def _set(values: dict[str, Any], path: KeyPath, value: Any) -> None:
    for key in path[:-1]:
        inner = values.get(key)
        if not isinstance(inner, dict):
            inner = values[key] = {}
        values = inner
    values[path[-1]] = value
