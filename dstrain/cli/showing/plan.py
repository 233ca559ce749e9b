"""A plan on the terminal: a summary, or all parts."""

from __future__ import annotations

from rich.console import Console

from dstrain.cli.showing.choices import choices
from dstrain.cli.showing.formatting import format_duration, headed
from dstrain.cli.showing.picture import picture
from dstrain.cli.showing.stages import memory, stages
from dstrain.cli.showing.time import time
from dstrain.estimate.disk import most_checkpoints
from dstrain.formatting import format_bytes, format_count
from dstrain.planning.plan import Plan

_VERDICTS = {"fits": "green", "tight": "yellow", "does not fit": "red"}
_SUMMARY_NOTES = 6  # lines of notes in a summary; a plan has them all


def show_plan(plan: Plan, console: Console, *, verbose: bool) -> None:
    """Print the plan: all of it, or a summary of at most 20 lines on a usual terminal."""
    if verbose:
        _show_all(plan, console)
    else:
        _show_summary(plan, console)


def _show_summary(plan: Plan, console: Console) -> None:
    _show_arithmetic(plan, console)
    console.print(headed("layout", _layout(plan)))
    if not plan.run_config.saves:
        console.print(headed("disk", _disk(plan)))
    _show_verdict(plan, console)
    if plan.time is not None:
        steps = plan.run_config.steps
        console.print(
            headed(
                "time",
                f"{format_duration(plan.time.total)} per step, {format_duration(plan.time.run_seconds)}"
                f" for {format_count(steps, 'step')}, estimated; {plan.time.tokens_per_second:,.0f} tokens/s",
            )
        )
    _show_not_covered(plan, console)
    for warning in plan.warnings[:_SUMMARY_NOTES]:
        console.print(headed("note", warning, "bold yellow"))
    hidden = len(plan.warnings) - _SUMMARY_NOTES
    more = f"{format_count(hidden, 'more note')}, " if hidden > 0 else ""
    console.print(
        headed(
            "",
            f"{more}stages, memory, traffic and the origin of each choice: see dstrain plan, or use --verbose",
            "dim",
        )
    )


def _show_all(plan: Plan, console: Console) -> None:
    _show_arithmetic(plan, console)
    console.print(headed("disk", _disk(plan)))
    console.print()
    console.print(picture(plan, console))
    console.print()
    console.print(stages(plan))
    console.print()
    console.print(memory(plan))
    _show_verdict(plan, console)
    console.print()
    if plan.time is not None:
        console.print(time(plan, plan.time))
        console.print()
    console.print(choices(plan))
    _show_not_covered(plan, console)
    for warning in plan.warnings:
        console.print(headed("note", warning, "bold yellow"))


def _show_arithmetic(plan: Plan, console: Console) -> None:
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


def _show_not_covered(plan: Plan, console: Console) -> None:
    """Code from outside, of which the tests that prove layouts equal know nothing."""
    if plan.not_covered:
        outside = f"not covered by the equality proof: {', '.join(plan.not_covered)}"
        console.print(headed("note", outside, "bold yellow"))


def _show_verdict(plan: Plan, console: Console) -> None:
    if plan.memory_verdict:
        colour = next(
            colour for verdict, colour in _VERDICTS.items() if plan.memory_verdict.startswith(verdict)
        )
        console.print(headed("memory", plan.memory_verdict, f"bold {colour}"))


def _layout(plan: Plan) -> str:
    layout, config = plan.layout, plan.run_config
    hosts = f"{format_count(len(layout.hosts), 'host')} ({plan.device})" if plan.device else ""
    return (
        f"ZeRO-{config.zero}, {format_count(layout.pipeline, 'stage')} x"
        f" {format_count(layout.data_parallel, 'replica')} = {format_count(layout.world_size, 'rank')} on"
        f" {hosts or format_count(len(layout.hosts), 'host')}, {config.precision}"
        + (f", {layout.schedule}" if layout.pipeline > 1 else "")
        + (f", optimizer states on {config.offload}" if config.offload != "none" else "")
    )


def _disk(plan: Plan) -> str:
    """What a checkpoint takes, and all of them at once."""
    config = plan.run_config
    if not config.saves:
        weights = f" (the final weights: {format_bytes(plan.disk_bytes)})" if config.save_weights else ""
        return f"no checkpoint (save_every: never): a run that fails or is stopped starts again from step 0{weights}"
    number = most_checkpoints(config)
    for_good = f", and every {config.keep_every:,}th step permanently" if config.keep_every else ""
    weights = ", and the final weights" if config.save_weights else ""
    return (
        f"about {format_bytes(plan.checkpoint_bytes)} per checkpoint, {format_bytes(plan.disk_bytes)} at most"
        f" ({number:,} at once: keep {config.keep}{for_good}, and the one being written{weights})"
    )
