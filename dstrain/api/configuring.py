"""``load_config``: combines a file, a recipe and Python values into one checked config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

from dstrain.config import loader
from dstrain.config.loader import ResolvedConfig


def load_config(
    file: str | PathLike[str] | None = None,
    *,
    recipe: str | None = None,
    settings: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
    **choices: Any,
) -> ResolvedConfig:
    """Lay choices on top of each other and check the whole: defaults < recipe < file < settings < choices.

        dstrain.load_config("my-run.yaml", zero=2, pipeline=4)

    Args:
        file: a YAML file. Without one and without ``recipe`` everything that is not chosen comes from the recipe
            ``quickstart``.
        recipe: a name of ``ds_configs/recipes``.
        settings: ``KEY=VALUE`` strings, as for ``--set``; a dotted KEY reaches into ``deepspeed``.
        flags: config keys with their values, as the command line's flags set them.
        choices: the same as keyword arguments.

    Raises:
        ConfigError: unknown keys, wrong types or impossible values, each with its place and the nearest valid key.
    """
    return loader.load_config(
        recipe=recipe,
        config_file=str(file) if file is not None else None,
        settings=settings,
        flags={**(flags or {}), **choices},
    )
