"""What a config says of its data that no files could make right."""

from __future__ import annotations

from itertools import pairwise

from dstrain.addresses import refuse_address
from dstrain.config.data_sources import ValidationSource, steps_of_phases, weights_by_phase
from dstrain.config.loader import DEFAULT_RECIPE, ResolvedConfig
from dstrain.errors import DstrainError
from dstrain.plugins import is_code


def _refuse_data_options(resolved: ResolvedConfig) -> None:
    config = resolved.config
    if config.data_options and not (isinstance(config.data, str) and is_code(config.data)):
        named = (
            f"{config.data} is none"
            if isinstance(config.data, str)
            else "data is a list: options of a source"
        )
        raise DstrainError(
            f"data_options ({', '.join(config.data_options)}) are for a dataset of your own, and {named}",
            where=str(resolved.origin("data_options", next(iter(config.data_options)))),
            hint="remove them, or name a dataset of your own: --data my_module:my_documents",
        )


def _refuse_addresses_of_data(resolved: ResolvedConfig) -> None:
    for source in resolved.config.read_sources:
        refuse_address(source.path, _place_of(source, resolved))


def _place_of(source: ValidationSource, resolved: ResolvedConfig) -> str:
    """What names it: the validation sets have a key of their own."""
    sets = resolved.config.validation
    named = isinstance(sets, list) and any(entry is source for entry in sets)
    return str(resolved.origin("validation" if named else "data"))


def _refuse_sources(resolved: ResolvedConfig) -> None:
    """What names of sources, and of validation sets, there can't be together."""
    config = resolved.config
    sets = config.validation if isinstance(config.validation, list) else []
    own = [source.called for source in config.sources if source.validation]
    for name in (entry.called for entry in sets):
        if name in own:
            raise DstrainError(
                f"two validation sets are called {name!r}: one of validation, and the source's own",
                where=str(resolved.origin("validation")),
                hint="give the one of validation another name",
            )
    for source in config.read_sources:
        if source.limit is not None and is_code(source.path):
            raise DstrainError(
                f"{source.path} can't have a limit: a dataset of your own gives all that it gives",
                where=_place_of(source, resolved),
                hint="make it an option of your function: options: {limit: 1000}",
            )
        if source.options and not is_code(source.path):
            raise DstrainError(
                f"options ({', '.join(source.options)}) are for a dataset of your own, and {source.path} is none",
                where=_place_of(source, resolved),
                hint="remove them, or name a dataset of your own: path: my_module:my_documents",
            )


def _refuse_phases(resolved: ResolvedConfig) -> None:
    config, where = resolved.config, str(resolved.origin("data_phases"))
    if not config.data_phases:
        return
    names = [source.called for source in config.sources]
    if len(config.sources) < 2:
        raise DstrainError(
            "data_phases are for several sources, and data is one",
            where=where,
            hint="give data a list of sources, or remove data_phases",
        )
    for phase in config.data_phases:
        unknown = [name for name in phase.weights if name not in names]
        if unknown:
            raise DstrainError(
                f"data_phases: there is no source called {unknown[0]!r}",
                where=where,
                hint=f"the sources are: {', '.join(names)}",
            )
    for source in config.sources:
        if source.weight is not None:
            raise DstrainError(
                f"{source.called} has a weight, and data_phases give weights too",
                where=where,
                hint="remove one of them",
            )
        if not any(phase.weights.get(source.called) for phase in config.data_phases):
            raise DstrainError(
                f"no phase has a weight above 0 for {source.called}, so it would never be trained on",
                where=where,
                hint="give it one, or remove the source",
            )
    ends = steps_of_phases(weights_by_phase(config.sources, config.data_phases), config.steps)
    if any(one >= other for one, other in pairwise((0, *ends))):
        raise DstrainError(
            f"the phases end after steps {', '.join(map(str, ends))}, and each must have at least one step",
            where=where,
            hint=f"the run has {config.steps:,} steps",
        )


def _refuse_stream(resolved: ResolvedConfig) -> None:
    """What can't be streamed, or needs to be known before all is read."""
    config, where = resolved.config, str(resolved.origin("data_stream"))
    if not config.data_stream:
        return
    steps = resolved.origin("steps")
    if steps.kind == "default" or steps.place.startswith(f"{DEFAULT_RECIPE}.yaml"):
        raise DstrainError(
            "data_stream needs the number of steps: how much data there is, is not known before it is read",
            where=where,
            hint="--steps N",
        )
    for source in config.sources:
        if is_code(source.path):
            raise DstrainError(
                f"{source.path} can't be streamed: data_stream reads files, and starts again in the middle of them",
                where=where,
                hint="set data_stream to false, or let your code write files",
            )


DATA_CHECKS = (
    _refuse_addresses_of_data,
    _refuse_data_options,
    _refuse_sources,
    _refuse_phases,
    _refuse_stream,
)
"""Each raises DstrainError."""
