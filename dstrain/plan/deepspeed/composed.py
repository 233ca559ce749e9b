"""The DeepSpeed JSON, composed from the fragments in ``ds_configs/``, each key with its origin.

A fragment is DeepSpeed JSON in which ``"$name"`` stands for a value that the plan derives. What the
user lays on top (``deepspeed:`` or ``--ds-config``) may add keys and change those that are free to
tune; a key that a choice of dstrain's decides can't be changed behind its back.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstrain.config.files import ds_configs
from dstrain.config.loader import ResolvedConfig
from dstrain.errors import DstrainError

KeyPath = tuple[str, ...]

# DeepSpeed keys that a run-config key decides: changing them elsewhere would break the plan's word.
OWNED: dict[KeyPath, str] = {
    ("train_batch_size",): "global_batch",
    ("train_micro_batch_size_per_gpu",): "micro_batch",
    ("gradient_accumulation_steps",): "micro_batch",
    ("gradient_clipping",): "gradient_clipping",
    ("zero_optimization", "stage"): "zero",
    ("zero_optimization", "offload_optimizer"): "offload",
    ("zero_optimization", "offload_param"): "offload",
    ("zero_optimization", "cpu_offload"): "offload",
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
        DstrainError: the user's file can't be read, or a key of it contradicts the plan.
    """
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
    for path, value, origin in _laid_on_top(resolved):
        if value == "auto":  # Hugging Face's word for "as derived"; DeepSpeed would drop it silently
            continue
        if _is_decided(path, value, origin, values, resolved):
            continue
        _set(values, path, value)
        origins[path] = origin
    return DeepSpeedConfig(values, origins)


def leaves(values: Mapping[str, Any], path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Every value that is no non-empty mapping, by its path of keys."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


def _laid_on_top(resolved: ResolvedConfig) -> Iterator[tuple[KeyPath, Any, str]]:
    """The user's own DeepSpeed keys: the file first, the config's mapping over it."""
    name = resolved.config.ds_config
    if name is not None:
        where = str(resolved.origin("ds_config"))
        try:
            document = json.loads(
                Path(name).read_text(encoding="utf-8-sig"),
                object_pairs_hook=_no_duplicates,
                parse_constant=_no_constant,
            )
        except OSError as error:
            raise DstrainError(f"can't read {name}: {error.strerror}", where=where) from None
        except UnicodeDecodeError as error:
            raise DstrainError(f"{name} is not UTF-8 text ({error.reason})", where=where) from None
        except json.JSONDecodeError as error:
            raise DstrainError(f"not valid JSON: {error.msg}", where=f"{name}:{error.lineno}") from None
        except ValueError as error:
            raise DstrainError(str(error), where=name) from None
        if not isinstance(document, dict):
            raise DstrainError("expected a JSON object", where=name)
        for path, value in leaves(document):
            yield path, value, name
    for path, value in leaves(resolved.config.deepspeed):
        yield path, value, str(resolved.origin("deepspeed", *path))


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice:
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return dict(pairs)


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is not JSON")


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
            f"{dotted} = {json.dumps(value)} stands where {dotted} holds keys of its own",
            where=origin,
            hint=f"{dotted}: {{{next(iter(decided), 'KEY')}: ...}} changes one of them",
        )
    if value == {} and isinstance(decided, dict):
        return True
    owner = next((OWNED[path[:n]] for n in range(1, len(path) + 1) if path[:n] in OWNED), None)
    if owner is None:
        return False
    if decided is not None and decided == value:
        return True
    choice = f"{owner} = {getattr(resolved.config, owner)} ({resolved.origin(owner)})"
    if decided is None:
        reason = f"{dotted} = {json.dumps(value)} is not for DeepSpeed's JSON to say: {choice} decides it"
    else:
        reason = (
            f"{dotted} = {json.dumps(value)} contradicts {json.dumps(decided)}, which follows from {choice}"
        )
    raise DstrainError(
        reason, where=origin, hint=f"leave {dotted} out and choose {owner} (--set {owner}=..., or in YAML)"
    )


def _set(values: dict[str, Any], path: KeyPath, value: Any) -> None:
    for key in path[:-1]:
        inner = values.get(key)
        if not isinstance(inner, dict):
            inner = values[key] = {}
        values = inner
    values[path[-1]] = value
