"""A plan for the eyes: the layout as a table, the arithmetic, and where each choice came from."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dstrain.plan.estimates.disk import in_words, most_checkpoints
from dstrain.plan.plan import Plan

# Above this many ranks the table shows one replica: the others are alike.
_RANKS_SHOWN = 32
_SHOWN_CHOICES = (
    "model", "init", "tokenizer", "data", "zero", "pipeline", "partition", "data_parallel", "schedule", "precision",
    "offload", "micro_batch", "global_batch", "seq_len", "steps", "optimizer", "lr",
    "gradient_clipping", "activation_checkpointing", "seed",
)  # fmt: skip


def show_plan(plan: Plan, console: Console) -> None:
    """Print the plan."""
    model, data = plan.model, plan.data
    console.print(
        Text.assemble(
            ("model  ", "bold"),
            f"{model['type']}, {model['parameters']:,} parameters, {len(model['layers'])} layers",
        )
    )
    console.print(
        Text.assemble(
            ("data   ", "bold"),
            f"{data['source']}: {data['documents']:,} documents, {data['tokens']:,} tokens,"
            f" {data['train_rows']:,} samples to train on, {data['held_out_rows']:,} held out",
        )
    )
    console.print(Text.assemble(("batch  ", "bold"), plan.batch.in_words()))
    console.print(Text.assemble(("disk   ", "bold"), _disk(plan)))
    console.print(_ranks(plan))
    console.print(_choices(plan))
    for warning in plan.warnings:
        console.print(Text.assemble(("note   ", "bold yellow"), warning))


def _disk(plan: Plan) -> str:
    """What a checkpoint takes, and all of them at once."""
    config = plan.run_config
    if not config.saves:
        weights = f" (the last weights: {in_words(plan.disk_bytes)})" if config.save_weights else ""
        return f"no checkpoint (save_every: never): what fails or is stopped begins anew{weights}"
    number = most_checkpoints(config)
    for_good = f", every {config.keep_every:,}th step's for good" if config.keep_every else ""
    weights = ", and the last weights" if config.save_weights else ""
    return (
        f"about {in_words(plan.checkpoint_bytes)} a checkpoint, {in_words(plan.disk_bytes)} at most"
        f" ({number:,} at once: keep {config.keep}{for_good}, and the one being written{weights})"
    )


def _ranks(plan: Plan) -> Table:
    layout = plan.layout
    title = f"{_count(layout.pipeline, 'stage')} x {_count(layout.data_parallel, 'replica')} on {plan.accelerator}"
    table = Table(title=title)
    for heading in ("rank", "host", "device", "stage", "layers", "parameters", "time", "replica"):
        table.add_column(heading, justify="left" if heading in ("host", "layers") else "right")
    names = plan.model["layers"]
    places = list(layout.places())
    shown = places if len(places) <= _RANKS_SHOWN else places[: layout.pipeline]
    for place in shown:
        table.add_row(
            str(place.rank),
            place.host,
            f"{plan.accelerator}:{place.local_rank}",
            str(place.stage),
            ", ".join(_span(names, span) for span in place.spans),
            f"{plan.stage_parameters[place.stage]:,}",
            f"{plan.stage_time[place.stage]:.2f}",
            str(place.replica),
        )
    if len(shown) < len(places):
        captions = [
            f"and {len(places) - len(shown)} more ranks: {layout.data_parallel - 1} replicas like this one"
        ]
    else:
        captions = []
    if layout.pipeline > 1:
        captions.append(_balance(plan))
    table.caption = "\n".join(captions) or None
    return table


def _balance(plan: Plan) -> str:
    """How even the cut is expected to be, and what ``auto`` would reach where something else was asked for."""
    text = f"estimated time of the slowest stage: {plan.imbalance:.2f} x the mean"
    if plan.config["partition"] == "auto":
        return text
    return f"{text} (--partition auto: {plan.imbalance_of_auto:.2f} x)"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number != 1 else ''}"


def _span(names: list[str], span: range) -> str:
    first, last = names[span[0]], names[span[-1]]
    return first if first == last else f"{first} .. {last}"


def _choices(plan: Plan) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("choice", style="bold")
    table.add_column("value")
    table.add_column("from", style="dim")
    separate = () if plan.config["pack"] else ("pack",)
    for key in (*_SHOWN_CHOICES, *separate):
        value = plan.config[key]
        if key == "data_parallel" and value is None:
            table.add_row(key, str(plan.layout.data_parallel), "what the devices allow")
        elif key == "micro_batch" and value is None:
            table.add_row(key, str(plan.batch.micro_batch), "derived from the global batch")
        elif key == "tokenizer" and value == "auto":
            table.add_row(key, str(plan.data["tokenizer"]), f"auto ({plan.origins[key]})")
        elif key in ("init", "partition") and plan.origins[key] == "default":
            continue
        else:
            table.add_row(key, str(value), plan.origins[key])
    return table
