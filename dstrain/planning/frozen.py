"""Frozen parameters: which they are, and what must stay to be trained."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase

from dstrain.config.loader import ResolvedConfig
from dstrain.errors import DstrainError
from dstrain.planning.layout import Layout
from dstrain.planning.model_shape import ModelShape


def is_frozen(name: str, patterns: Sequence[str]) -> bool:
    """Whether a parameter of this Hugging Face name is frozen by this name."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def frozen_names(shape: ModelShape, patterns: Sequence[str]) -> set[str]:
    """The names of all frozen parameters. A tied weight has several: frozen by one, it is frozen by all."""
    names = (name for layer in shape.layers for name in layer.tensors)
    frozen = {name for name in names if is_frozen(name, patterns)} if patterns else set()
    for tied in shape.tied:
        if not frozen.isdisjoint(tied.names):
            frozen.update(tied.names)
    return frozen


def check_frozen(resolved: ResolvedConfig, shape: ModelShape, layout: Layout) -> None:
    """Refuse a pattern that freezes nothing, and a stage that would have nothing to train.

    Raises DstrainError.
    """
    names = [name for layer in shape.layers for name in layer.tensors]
    where = str(resolved.origin("freeze"))
    for pattern in resolved.config.freeze:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.3)
            raise DstrainError(
                f"no parameter of {shape.model_type} matches {pattern!r}",
                where=where,
                hint=f"names look like {near[0] if near else names[0]}; * matches anything",
            )
    frozen = frozen_names(shape, resolved.config.freeze)
    for stage in range(layout.pipeline):
        held = [
            name for chunk in layout.chunks(stage) for layer in chunk for name in shape.layers[layer].tensors
        ]
        if held and frozen.issuperset(held):
            raise DstrainError(
                f"stage {stage} would have only frozen parameters, and DeepSpeed needs a trainable one on each stage",
                where=where,
                hint="fewer --pipeline stages, so that each has a trainable layer, or freeze less",
            )
