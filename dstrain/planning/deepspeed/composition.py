"""Composes the DeepSpeed JSON from the fragments in ``ds_configs/``, with the origin of each key.

A fragment is DeepSpeed JSON in which ``"$name"`` stands for a value that the plan derives, as the table of keys says
(`dstrain.planning.deepspeed.keys`). What the
user lays on top (``deepspeed:`` or ``--ds-config``) may add keys and change those that are free to
tune; a key that a choice of dstrain's decides can't be changed behind its back.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from dstrain.config.deepspeed_keys import canonical, effects, find, what_is_wrong
from dstrain.config.deepspeed_scheduler import SCHEDULERS
from dstrain.config.files import ds_configs
from dstrain.config.loader import ResolvedConfig
from dstrain.config.schema import RunConfig
from dstrain.config.values import KeyPath, leaves
from dstrain.errors import DstrainError
from dstrain.optimizers import optimizer_facts
from dstrain.planning.batch import Batch
from dstrain.planning.deepspeed.keys import KEYS, NEEDS_CUDA, Decided, owner_of
from dstrain.planning.deepspeed.user_keys import UserKey, mistakes, user_keys
from dstrain.plugins import is_code

_OFFLOAD_DEVICES = (
    ("zero_optimization", "offload_optimizer", "device"),
    ("zero_optimization", "offload_param", "device"),
)


@dataclass(frozen=True)
class DeepSpeedConfig:
    """The composed JSON and the origin of each leaf.

    ``not_covered``: the user's keys that change what is computed, each with its value and place.
    """

    values: dict[str, Any]
    origins: dict[KeyPath, str]
    not_covered: tuple[str, ...] = ()


def deepspeed_config(
    resolved: ResolvedConfig, batch: Batch, accelerator: str, stage_parameters: int
) -> DeepSpeedConfig:
    """The DeepSpeed JSON of a plan: the fragments of its choices with their derived values, and the user's keys on top.

    Args:
        accelerator: ``cuda`` or ``cpu``.
        stage_parameters: of the largest stage.

    Raises:
        DstrainError: the user's file can't be read, a key is wrong, contradicts the plan, or needs a GPU where there
            is none.
    """
    for mistake in mistakes(resolved):
        raise mistake
    decided = Decided(resolved, batch, accelerator, stage_parameters)
    composed, usual = _from_fragments(decided), _from_fragments(decided)
    for key in _in_effect(user_keys(resolved), resolved.config):
        _lay_on_top(key, composed, resolved)
    changed = list(_changed(composed, usual))
    for path, value in changed:
        if accelerator == "cpu" and path in NEEDS_CUDA and value is not False:
            raise DstrainError(
                f"{'.'.join(path)} = {json.dumps(value)}: DeepSpeed has it for CUDA devices only, but the run is on"
                f" {accelerator}",
                where=composed.origins[path],
                hint="remove it",
            )
    told = (
        f"{'.'.join(path)} = {json.dumps(value)} ({composed.origins[path]})"
        for path, value in changed
        if "arithmetic" in effects(path)
    )
    return replace(composed, not_covered=tuple(told))


def user_values(resolved: ResolvedConfig) -> dict[str, Any]:
    """The user's own keys alone, as they stand in the composed JSON: what estimates need where no JSON is composed.

    Raises:
        DstrainError: the user's file can't be read.
    """
    values: dict[str, Any] = {}
    for key in _in_effect(user_keys(resolved), resolved.config):
        if key.value != "auto":
            _set(values, canonical(key.path), key.value)
    return values


def _changed(composed: DeepSpeedConfig, usual: DeepSpeedConfig) -> Iterator[tuple[KeyPath, Any]]:
    """The keys that have another value than they would have without the user's, and that are in use.

    Those of a block that is switched off are not.
    """
    for path, value in leaves(composed.values):
        node = find(path) or {}
        if value == _at(usual.values, path, node.get("default")):
            continue
        above = [path[:depth] for depth in range(1, len(path))]
        switches = [(*block, "enabled") for block in above if (*block, "enabled") != path]
        if all(_at(composed.values, each, (find(each) or {}).get("default", True)) for each in switches):
            yield path, value


def _at(values: Any, path: KeyPath, absent: Any) -> Any:
    for key in path:
        if not isinstance(values, dict) or key not in values:
            return absent
        values = values[key]
    return values


def contradictions_of_config(resolved: ResolvedConfig) -> list[DstrainError]:
    """Every one of the user's DeepSpeed keys that contradicts the run config itself, whatever the model and machine.

    What the machine decides, the micro-batch or the number of replicas, is compared when a plan is made. Keys that are
    wrong in themselves, and a file that can't be read, are not among them: see `mistakes`.
    """
    try:
        keys = _in_effect(user_keys(resolved), resolved.config)
    except DstrainError:
        return []
    if not keys:
        return []
    config = resolved.config
    micro, replicas, undecided = config.micro_batch, config.data_parallel, []
    if micro is None:
        undecided.append(("train_micro_batch_size_per_gpu",))
    share = (micro or 1) * (replicas or 1)
    if micro is None or replicas is None or config.global_batch % share:
        undecided.append(("gradient_accumulation_steps",))
    batch = Batch(
        config.global_batch, micro or 1, config.global_batch // share, replicas or 1, config.seq_len
    )
    composed, found = _from_fragments(Decided(resolved, batch, "cpu", 1)), []
    for key in keys:
        if canonical(key.path) in undecided or what_is_wrong(key.path, key.value):
            continue
        try:
            _lay_on_top(key, composed, resolved)
        except DstrainError as error:
            found.append(error)
    return found


def _from_fragments(decided: Decided) -> DeepSpeedConfig:
    values: dict[str, Any] = {}
    origins: dict[KeyPath, str] = {}
    for name in _fragments(decided.resolved.config):
        for path, value in _leaves_of(name):
            origin = f"ds_configs/{name}.json"
            if isinstance(value, str) and value.startswith("$"):
                derivation = KEYS[path].derived
                assert derivation is not None and derivation.name == value[1:], path
                derived = derivation.of(decided)
                value, origin = derived.value, derived.origin
            _set(values, path, value)
            origins[path] = origin
    return DeepSpeedConfig(values, origins)


def _fragments(config: RunConfig) -> list[str]:
    """The fragments of these choices, later ones over earlier ones."""
    fragments = ["base", f"zero/{config.zero}", f"precision/{config.precision}"]
    if config.offload != "none":
        fragments.append(f"offload/{config.offload}")
    if not is_code(config.optimizer):
        facts = optimizer_facts(config.optimizer)
        offloaded = facts.offloaded_fragment if config.offload != "none" else None
        fragments.append(f"optimizer/{offloaded or facts.fragment}")
    if config.pipeline > 1:
        fragments.append("pipeline/stages")
    return fragments


@lru_cache(maxsize=64)
def _leaves_of(fragment: str) -> tuple[tuple[KeyPath, Any], ...]:
    """What a fragment holds: numbers, words and null. It comes with dstrain, and is read once."""
    return tuple(leaves(json.loads((ds_configs() / f"{fragment}.json").read_text(encoding="utf-8"))))


def _lay_on_top(key: UserKey, composed: DeepSpeedConfig, resolved: ResolvedConfig) -> None:
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
    if _repeats_a_choice(path, value, resolved.config):
        return True
    choice = f"{owner} = {getattr(resolved.config, owner)} ({resolved.origin(owner)})"
    if decided is None:
        reason = f"{dotted} = {json.dumps(value)} can't be set in DeepSpeed's JSON: {choice} decides it"
    else:
        reason = (
            f"{dotted} = {json.dumps(value)} contradicts {json.dumps(decided)}, which follows from {choice}"
        )
    derived = KEYS[path].derived if path in KEYS else None
    wanted = json.dumps(value) if derived is not None and derived.name == owner else "..."
    raise DstrainError(
        reason,
        where=origin,
        hint=f"remove {dotted} and set {owner} instead (--set {owner}={wanted}, or in YAML)",
    )


def _repeats_a_choice(path: KeyPath, value: Any, config: RunConfig) -> bool:
    """Whether a key that dstrain leaves out of the JSON says what the config says."""
    if path == ("scheduler", "type"):
        known = SCHEDULERS.get(value) if isinstance(value, str) else None
        return known is not None and known.lr_schedule == config.lr_schedule
    return False


def _in_effect(keys: Iterable[UserKey], config: RunConfig) -> list[UserKey]:
    """Without those of an offload block that says ``"device": "none"``, where the run offloads nothing."""
    listed = list(keys)
    unused = {
        path[:-1]
        for key in listed
        if (path := canonical(key.path)) in _OFFLOAD_DEVICES
        and key.value == "none"
        and config.offload == "none"
    }
    return [key for key in listed if canonical(key.path)[:2] not in unused]


def _set(values: dict[str, Any], path: KeyPath, value: Any) -> None:
    for key in path[:-1]:
        inner = values.get(key)
        if not isinstance(inner, dict):
            inner = values[key] = {}
        values = inner
    values[path[-1]] = value
