"""A plan on the terminal: a summary, or all parts."""

from __future__ import annotations

from rich.console import Console

from dstrain.cli.showing.estimates import format_duration, headed, memory, stages, time
from dstrain.cli.showing.picture import picture
from dstrain.cli.showing.tables import Column, FoldingTable
from dstrain.config.text_file import shown
from dstrain.estimate.disk import most_checkpoints
from dstrain.formatting import format_bytes, format_count
from dstrain.planning.plan import Plan, PlannedData
from dstrain.plugins import is_code

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
    adapter = plan.run_config.adapter
    if adapter is not None:
        share = model.adapter_parameters / model.parameters
        words = f"{adapter.type}, r {adapter.r}, alpha {adapter.alpha:g}"
        words += f", on {model.bits[:-3]}-bit weights" if model.bits else ""
        console.print(
            headed(
                "adapter", f"{words}: {model.adapter_parameters:,} parameters are trained, {share:.2%} of all"
            )
        )
    if data.sources:
        _show_sources(data, console)
        console.print(headed("batch", plan.batch.describe()))
        return
    console.print(
        headed(
            "data",
            f"{data.source}: {_documents(data)},"
            f" {_training_samples(data)}, {data.validation_rows:,} validation samples"
            f"{_ends_of_documents(data)}",
        )
    )
    if data.kinds:
        left_out = f"; left out: {shown(data.left_out)}" if data.left_out else ""
        console.print(headed("files", f"{shown(data.kinds)}{left_out}"))
    console.print(headed("batch", plan.batch.describe()))


def sources(data: PlannedData) -> FoldingTable:
    """What is trained on and evaluated, a row a source: the run's samples of it, and how often it is seen."""
    table = FoldingTable(
        Column("data", style="bold", gives=True),
        Column("format", gives=True),
        *(Column(name, right=True) for name in ("documents", "tokens", "samples", "share", "epochs")),
    )
    tokens = sum(source.rows * (1 - source.data.padding) for source in data.training_sources)
    for source in data.sources:
        held = source.data
        share = source.rows * (1 - held.padding) / tokens
        about = "about " if held.streamed else ""
        table.add_row(
            source.name,
            held.format,
            *(f"{about}{count:,}" for count in (held.documents, held.tokens, held.train_rows)),
            f"{share:.1%}" if source.trained else "validation",
            f"{source.epochs:.2f}" if source.trained else "-",
        )
    return table


def _show_sources(data: PlannedData, console: Console) -> None:
    console.print(sources(data))
    ends = list(dict.fromkeys(_ends_of_documents(source.data).removeprefix("; ") for source in data.sources))
    console.print(headed("data", "; ".join(each for each in ends if each)))
    for source in data.sources:
        left_out = f"; left out: {shown(source.data.left_out)}" if source.data.left_out else ""
        if source.data.kinds:
            console.print(headed("files", f"{source.name}: {shown(source.data.kinds)}{left_out}"))
    if data.streamed:
        console.print(
            headed("stream", "streamed: tokens are counted while training; until then numbers are estimates")
        )
    less = [
        f"{source.name}: {', '.join(counts)}" for source in data.sources if (counts := _left_out(source.data))
    ]
    if less:
        console.print(headed("less", "; ".join(less)))


_TRAINED = {
    "assistant": "trained on what the assistant writes",
    "last": "trained on the assistant's last turn",
    "all": "trained on every token",
}


def _training_samples(data: PlannedData) -> str:
    if data.streamed:
        return f"about {data.train_rows:,} training samples an epoch"
    return f"{data.train_rows:,} training samples"


def _documents(data: PlannedData) -> str:
    field = f" (field {shown(data.text_field)!r})" if data.text_field else ""
    if data.streamed:
        files = f"{format_count(data.files, 'file')} ({data.format}{field}, {format_bytes(data.bytes)})"
        return f"{files}, streamed: tokens are counted while training"
    if data.trained_tokens is None:
        as_they_are = f" ({data.format}, taken as they are)" if data.format != "text" else ""
        empty = f", {data.empty_documents:,} empty or left out" if data.empty_documents else ""
        return f"{data.documents:,} documents{field}{as_they_are}, {data.tokens:,} tokens{empty}"
    what = {"prompt-completion": "prompts with completions", "tokens": "documents"}.get(
        data.format, "conversations"
    )
    share = f"{data.trained_tokens:,} of {data.tokens:,} tokens are trained"
    return ", ".join([f"{data.documents:,} {what} ({data.format})", share, *_left_out(data)])


def _left_out(data: PlannedData) -> list[str]:
    """Which conversations are not there, or not whole, in words."""
    if data.trained_tokens is None:
        return []
    counts = (
        (data.empty_documents, "left out as bad records"),
        (data.dropped_documents, "dropped, longer than a sample"),
        (data.cut_documents, "cut, longer than a sample"),
    )
    return [f"{count:,} {words}" for count, words in counts if count]


def _ends_of_documents(data: PlannedData) -> str:
    if data.format == "tokens" and data.trained_tokens is not None:
        return "; trained as their labels say"
    if data.trained_tokens is not None:
        untrained = "" if data.train_stop_token else ", which is not trained"
        ends = f"; turns end with {shown(data.ends_with)}{untrained}" if data.ends_with else ""
        return f"; {_TRAINED.get(data.train_on, data.train_on)}{ends}"
    if not data.ends_with:  # a plan of a version that did not say it
        return ""
    begins = f"begins with {shown(data.begins_with)}, " if data.begins_with else ""
    return f"; each document {begins}ends with {shown(data.ends_with)}"


def _show_not_covered(plan: Plan, console: Console) -> None:
    """What the tests that prove layouts equal know nothing of."""
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


_SHOWN = (
    "model", "init", "tokenizer", "data", "zero", "pipeline", "partition", "data_parallel", "schedule", "precision",
    "offload", "micro_batch", "global_batch", "seq_len", "steps", "optimizer", "lr",
    "gradient_clipping", "activation_checkpointing", "attention", "seed",
)  # fmt: skip
_BESIDE = (
    "data_options",
    "loss_options",
    "optimizer_options",
    "lr_schedule_options",
    "trackers",
    "profile",
    "hooks",
)


def choices(plan: Plan) -> FoldingTable:
    """Key, value and origin of what decides most."""
    table = FoldingTable(
        Column("choice", style="bold"), Column("value", gives=True), Column("from", gives=True, style="dim")
    )
    separate = () if plan.config["pack"] else ("pack",)
    own = [key for key in ("loss", "lr_schedule") if is_code(plan.config.get(key, ""))]
    beside = [key for key in _BESIDE if plan.config.get(key)]
    timeout = ("communication_timeout",) if plan.layout.world_size > 1 else ()
    for key in (*_SHOWN, *separate, *own, *beside, *timeout):
        value = plan.config.get(key)
        if key == "data_parallel" and value is None:
            table.add_row(key, str(plan.layout.data_parallel), "as many as the devices allow")
        elif key == "micro_batch" and value is None:
            table.add_row(key, str(plan.batch.micro_batch), "derived from the global batch")
        elif key == "communication_timeout" and value is None:
            table.add_row(key, "10m", "default, or DEEPSPEED_TIMEOUT (minutes)")
        elif key == "attention" and value == "auto":
            table.add_row(key, plan.attention or "auto", f"auto ({plan.origins[key]})")
        elif key == "tokenizer" and value == "auto":
            table.add_row(key, str(plan.data.tokenizer), f"auto ({plan.origins[key]})")
        elif key == "data" and isinstance(value, list):
            table.add_row(key, str(plan.data.source), plan.origins[key])
        elif key in ("init", "partition") and plan.origins[key] == "default":
            continue
        else:
            table.add_row(key, str(value), plan.origins[key])
    return table
