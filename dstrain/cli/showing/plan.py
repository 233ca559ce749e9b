"""The whole plan, part by part: the arithmetic, the picture, memory, time, the choices, and what to know."""

from __future__ import annotations

from rich.console import Console

from dstrain.cli.showing.choices import choices
from dstrain.cli.showing.formatting import headed
from dstrain.cli.showing.picture import picture
from dstrain.cli.showing.stages import memory, stages
from dstrain.cli.showing.time import time
from dstrain.estimate.disk import most_checkpoints
from dstrain.formatting import format_bytes
from dstrain.planning.plan import Plan

_VERDICTS = {"fits": "green", "tight": "yellow", "does not fit": "red"}


def show_plan(plan: Plan, console: Console) -> None:
    """Print the plan."""
    model, data = plan.model, plan.data
    console.print(
        headed("model", f"{model.type}, {model.parameters:,} parameters, {len(model.layers)} layers")
    )
    console.print(
        headed(
            "data",
            f"{data.source}: {data.documents:,} documents, {data.tokens:,} tokens,"
            f" {data.train_rows:,} training samples, {data.validation_rows:,} validation samples",
        )
    )
    console.print(headed("batch", plan.batch.describe()))
    console.print(headed("disk", _disk(plan)))
    console.print()
    console.print(picture(plan, console))
    console.print()
    console.print(stages(plan))
    console.print()
    console.print(memory(plan))
    if plan.memory_verdict:
        colour = next(
            colour for verdict, colour in _VERDICTS.items() if plan.memory_verdict.startswith(verdict)
        )
        console.print(headed("memory", plan.memory_verdict, f"bold {colour}"))
    console.print()
    if plan.time is not None:
        console.print(time(plan, plan.time))
        console.print()
    console.print(choices(plan))
    if plan.not_covered:
        outside = f"not covered by the equality proof: {', '.join(plan.not_covered)}"
        console.print(headed("note", outside, "bold yellow"))
    for warning in plan.warnings:
        console.print(headed("note", warning, "bold yellow"))


def _disk(plan: Plan) -> str:
    """What a checkpoint takes, and all of them at once."""
    config = plan.run_config
    if not config.saves:
        weights = f" (the last weights: {format_bytes(plan.disk_bytes)})" if config.save_weights else ""
        return f"no checkpoint (save_every: never): what fails or is stopped begins anew{weights}"
    number = most_checkpoints(config)
    for_good = f", every {config.keep_every:,}th step's for good" if config.keep_every else ""
    weights = ", and the last weights" if config.save_weights else ""
    return (
        f"about {format_bytes(plan.checkpoint_bytes)} a checkpoint, {format_bytes(plan.disk_bytes)} at most"
        f" ({number:,} at once: keep {config.keep}{for_good}, and the one being written{weights})"
    )
