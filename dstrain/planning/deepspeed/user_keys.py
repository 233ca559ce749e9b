"""DeepSpeed keys set by the user in ``ds_config`` and ``deepspeed``: read with their lines, and checked.

What is checked here needs neither the model nor the data nor the machine: whether DeepSpeed knows the key, whether it
takes the value, and whether it does with it in this run what its name says. What contradicts the plan is found when
the JSON is composed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from dstrain.config.deepspeed_keys import canonical, what_is_wrong
from dstrain.config.loader import ResolvedConfig
from dstrain.config.schema import RunConfig
from dstrain.config.values import KeyPath, leaves
from dstrain.errors import DstrainError
from dstrain.planning.deepspeed.keys import KEYS, PACKAGES, is_on
from dstrain.planning.hook_specs import is_installed


@dataclass(frozen=True)
class UserKey:
    """A key with a value, the place where it is set, and the places of the blocks around it."""

    path: KeyPath
    value: Any
    places: tuple[str, ...]

    @property
    def place(self) -> str:
        return self.places[-1]


def user_keys(resolved: ResolvedConfig) -> Iterator[UserKey]:
    """The user's own keys, under DeepSpeed's first names: the file first, the config's mapping over it.

    Raises:
        DstrainError: the file can't be read.
    """
    name, document = resolved.config.ds_config, resolved.ds_config
    if isinstance(document, DstrainError):
        raise document
    if document is not None:
        for path, value in leaves(document.values):
            places = tuple(f"{name}:{document.lines[path[:depth]]}" for depth in range(1, len(path) + 1))
            yield UserKey(path, value, places)
    for path, value in leaves(resolved.config.deepspeed):
        yield UserKey(path, value, tuple(_places(resolved, ("deepspeed", *path))))


def _places(resolved: ResolvedConfig, path: KeyPath) -> Iterator[str]:
    """The place of each key on the way to ``path``, below its first; a block's own line, if it is in the same file."""
    leaf = str(resolved.origin(*path))
    for depth in range(2, len(path)):
        block = str(resolved.blocks.get(path[:depth], leaf))
        yield block if block.rpartition(":")[0] == leaf.rpartition(":")[0] else leaf
    yield leaf


def mistakes(resolved: ResolvedConfig) -> list[DstrainError]:
    """What is wrong with the user's own DeepSpeed keys, each once; or with the file that they should stand in."""
    found: dict[str, DstrainError] = {}
    try:
        keys = list(user_keys(resolved))
    except DstrainError as error:
        return [error]
    for key in keys:
        mistake = _mistake(key, resolved.config)
        if mistake:
            found.setdefault(f"{mistake.where} {mistake.message}", mistake)
    return list(found.values())


def _mistake(key: UserKey, config: RunConfig) -> DstrainError | None:
    wrong = what_is_wrong(key.path, key.value)
    if wrong:
        known = KEYS.get(key.path)
        hint = known.successor if known is not None and known.successor else wrong.hint
        wrong = replace(wrong, hint=hint)
        return wrong.at(key.places[wrong.depth - 1])
    path = canonical(key.path)
    for depth in range(1, len(path) + 1):
        known = KEYS.get(path[:depth])
        unfit = known.unfit if known is not None else None
        value = key.value if depth == len(path) else {path[depth]: key.value}
        if unfit and unfit.values(value) and unfit.runs(config):
            given = f"{'.'.join(path)} = {json.dumps(key.value)}"
            return DstrainError(f"{given}: {unfit.reason}", where=key.place, hint=unfit.instead)
    return None


def check_packages_here(resolved: ResolvedConfig) -> None:
    """Refuse what DeepSpeed needs a package for that is not installed: a rank would find that out.

    Raises:
        DstrainError: the key, the package, and what to do instead. Or the user's file can't be read.
    """
    for key in user_keys(resolved):
        needed = PACKAGES.get(canonical(key.path))
        if needed is None or not is_on(key.value) or is_installed(needed.package):
            continue
        raise DstrainError(
            f"{'.'.join(key.path)} needs the Python package {needed.package}, which is not installed",
            where=key.place,
            hint=f"install it, or remove {'.'.join(key.path)}{needed.instead}",
        )
