"""Where a recipe's value gives way: the user has chosen something that it does not fit to, and it can be derived.

A recipe's word is not the user's. What they have set themselves, in a file, with ``--set`` or a flag, is refused where
it does not fit.
"""

from __future__ import annotations

from dataclasses import replace

from dstrain.config.files import recipe_path
from dstrain.config.loader import CONVERSATIONS_RECIPE, PRETRAINED_RECIPE, ResolvedConfig, replace_values
from dstrain.config.origins import Origin
from dstrain.config.yaml_reader import read_yaml
from dstrain.planning.layout import choose_data_parallel
from dstrain.planning.model_shape import ModelShape
from dstrain.planning.plan import PlannedData

_NOT_THE_USERS = ("recipe", "default")
_OF_THE_TASK = ("lr", "lr_schedule", "lr_final", "betas", "weight_decay", "warmup_steps")


def fit_recipe(resolved: ResolvedConfig, shape: ModelShape, slots: int | None) -> ResolvedConfig:
    """The config, without what a recipe says and what does not fit to this model, these devices and the rest of it.

    Args:
        slots: all devices together; None where processes can be had at will.

    Raises:
        DstrainError: so many stages and replicas can't be placed on the devices.
    """
    resolved = within_positions(resolved, shape)
    config = resolved.config
    replicas = choose_data_parallel(
        config.pipeline, config.data_parallel, slots, where=str(resolved.origin("pipeline"))
    )
    if fitting_micro_batch(resolved, replicas) == config.micro_batch:
        return resolved
    said = f"{resolved.origin('micro_batch')} says {config.micro_batch}"
    return replace_values(resolved, {"micro_batch": None}, Origin("derived", f"derived: {said}"))


def follow_data(resolved: ResolvedConfig, data: PlannedData) -> ResolvedConfig:
    """With the optimizer's values for conversations, where pretrained weights see them and nobody has named a recipe.

    Which recipe suits depends on what the data hold, which shows only when they are read.
    """
    if not resolved.recipe_by_default or data.trained_tokens is None:
        return resolved
    recipe = recipe_path(CONVERSATIONS_RECIPE, where="--recipe")
    document = read_yaml(recipe, where="--recipe")
    for key in _OF_THE_TASK:
        origin = resolved.origin(key)
        if origin.kind == "recipe" and origin.place.startswith(PRETRAINED_RECIPE):
            place = Origin("recipe", f"{recipe.name}:{document.lines[(key,)]}")
            resolved = replace_values(resolved, {key: document.values[key]}, place)
    return resolved


def fitting_micro_batch(resolved: ResolvedConfig, replicas: int) -> int | None:
    """The micro-batch size; None, to be derived, for a recipe's that does not divide what each replica gets.

    Nor may it leave fewer micro-batches than DualPipeV needs.
    """
    config = resolved.config
    size = config.micro_batch
    if size is None or resolved.origin("micro_batch").kind not in _NOT_THE_USERS:
        return size
    share, rest = divmod(config.global_batch, replicas)
    if rest:  # no size would mend that
        return size
    needed = 2 * config.pipeline if config.schedule == "dualpipev" else 1
    return size if share % size == 0 and share // size >= needed else None


def within_positions(resolved: ResolvedConfig, shape: ModelShape) -> ResolvedConfig:
    """With samples of the model's own length, where those of a recipe or of the defaults are longer."""
    most, length, origin = shape.max_positions, resolved.config.seq_len, resolved.origin("seq_len")
    if most is None or length <= most or origin.kind not in _NOT_THE_USERS:
        return resolved
    said = f"{origin} says {length}" if origin.kind == "recipe" else f"the default is {length}"
    fitted = replace_values(resolved, {"seq_len": most}, Origin("derived", f"the model's positions: {said}"))
    note = f"seq_len is {most}, all positions that the model has; {said}"
    return replace(fitted, notes=(*resolved.notes, note))
