"""Warnings of a plan: configs that are valid but probably not intended, each with its reason."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from dstrain.config.loader import PRETRAINED_RECIPE, ResolvedConfig
from dstrain.config.schema import RunConfig
from dstrain.estimate.device import Device
from dstrain.estimate.memory import USABLE, StageMemory, memory_needed
from dstrain.estimate.memory_activations import loss_bytes
from dstrain.estimate.stage_parameters import moment_bytes
from dstrain.estimate.time import StepTime, backward_passes, stages_waiting
from dstrain.estimate.traffic import traffic, trained_parameters
from dstrain.formatting import format_count
from dstrain.losses import COPIES
from dstrain.lr_schedules import schedule_keys
from dstrain.optimizers import option_keys
from dstrain.planning.batch import Batch
from dstrain.planning.layout import Layout, count_chunks
from dstrain.planning.model_shape import ModelShape, describe_randomness
from dstrain.planning.plan import PlannedData
from dstrain.plugins import is_code

_OF_CONVERSATIONS = ("chat_template", "train_on", "train_stop_token", "too_long")


def warnings_about(
    config: RunConfig,
    layout: Layout,
    batch: Batch,
    data: PlannedData,
    shape: ModelShape,
    time: StepTime | None = None,
) -> list[str]:
    """What is accepted, but may not be what was meant. ``time``: None where it is not known."""
    found: list[str] = []
    if layout.pipeline > 1:
        found += _about_the_pipeline(config, layout, batch, shape, time)
    if config.warmup_steps >= config.steps:
        found.append(
            f"the warm-up ({config.warmup_steps} steps) is as long as the run ({config.steps}): the"
            " learning rate never decays"
        )
    if config.zero and layout.data_parallel == 1:
        found.append(f"ZeRO-{config.zero} shards memory across replicas, but there is only one")
    if shape.dropout:
        found.append(
            f"the model uses dropout (up to {shape.dropout:g}), which depends on the layout: layouts agree only on"
            " average; set dropout to 0 in its config.json to make them equal"
        )
    if shape.adapter_drops_by_layout:
        found.append(
            "modules of this model are given tokens of unknown samples, such as experts that are run one by one, and"
            " what the adapter drops there depends on the layout: layouts agree only on average; set adapter.dropout"
            " to 0 to make them equal"
        )
    if shape.randomness is not None:
        found.append(
            f"the model draws random numbers in training ({describe_randomness(shape)}), which depend on the layout:"
            " layouts agree only on average"
            + ("; set it to 0 in its config.json to make them equal" if shape.randomness else "")
        )
    if shape.router_loss and config.micro_batch is None:
        found.append(
            "the experts' router loss is computed per micro-batch: set --micro-batch to compare layouts"
            f" (here {batch.micro_batch}, derived from the layout)"
        )
    if data.padding >= 0.005:
        found.append(
            f"{data.padding:.0%} of the tokens are padding: "
            + (
                "no conversation is cut, and a larger --seq-len would leave less"
                if config.pack
                else "with --no-pack each sample holds one document, and its padding costs time without training"
                " anything"
            )
        )
    texts = all(each.trained_tokens is None for each in data.parts)
    changed = _changed(config, _OF_CONVERSATIONS) if texts else []
    if changed:
        found.append(
            f"{' and '.join(changed)} {'have' if changed[1:] else 'has'} no effect: the data are texts, and no"
            " conversations"
        )
    untouched = [source.name for source in data.training_sources if not source.rows]
    if untouched:
        found.append(f"nothing of {', '.join(untouched)} is trained on in {config.steps:,} steps")
    epochs = config.steps * config.global_batch / data.train_rows
    if epochs > 1 and not data.sources:  # whose table shows it
        about = "about " if data.streamed else ""
        found.append(f"the data's {about}{data.train_rows:,} samples are seen {about}{epochs:.1f} times")
    return found


def warnings_about_pretrained(resolved: ResolvedConfig) -> list[str]:
    """A learning rate for random weights that nobody has chosen for these."""
    config, origin = resolved.config, resolved.origin("lr")
    chosen = origin.kind in ("file", "set", "flag") or origin.place.startswith(PRETRAINED_RECIPE)
    if config.init != "pretrained" or chosen:
        return []
    return [
        f"lr {config.lr:g} ({origin}) is meant for random weights, and may destroy pretrained ones:"
        f" --recipe {PRETRAINED_RECIPE} has one for them, --lr sets it"
    ]


def warnings_about_optimizer(config: RunConfig) -> list[str]:
    """What is assumed of an optimizer from outside, and what it does not take."""
    if not is_code(config.optimizer):
        return []
    found = [
        f"{config.optimizer} is estimated as AdamW: {moment_bytes(config)} bytes of states a parameter. With ZeRO it is"
        " given flat pieces of parameters: layouts train the same model if it updates every number by itself, which"
        " `dstrain verify` tries"
    ]
    changed = _changed(config, [key for key in option_keys() if key != "weight_decay"])
    if changed:
        found.append(
            f"{' and '.join(changed)} {'are' if changed[1:] else 'is'} not for {config.optimizer}, which is made with"
            " lr, weight_decay and optimizer_options"
        )
    return found


def warnings_about_lr_schedule(config: RunConfig) -> list[str]:
    """The keys that a schedule from outside does not take."""
    changed = _changed(config, schedule_keys()) if is_code(config.lr_schedule) else []
    if not changed:
        return []
    return [
        f"{' and '.join(changed)} {'are' if changed[1:] else 'is'} not for {config.lr_schedule}, which is called with"
        " the step, the number of steps and lr_schedule_options"
    ]


def warnings_about_loss(config: RunConfig, shape: ModelShape, batch: Batch) -> list[str]:
    """What is assumed of a loss from outside."""
    if not is_code(config.loss):
        return []
    taken = loss_bytes(config, shape, batch.micro_batch)
    return [
        f"{config.loss} is estimated as F.cross_entropy(logits.float(), labels): {COPIES} copies of the logits in fp32,"
        f" {_size(taken)}. Layouts train the same model if it computes every token's loss from that"
        " token's logits alone, which `dstrain verify` tries"
    ]


def _changed(config: RunConfig, keys: Iterable[str]) -> list[str]:
    """Those that are not at their defaults."""
    return [key for key in keys if getattr(config, key) != RunConfig.model_fields[key].default]


def warnings_about_determinism(config: RunConfig, accelerator: str) -> list[str]:
    """What ``deterministic`` costs."""
    if not config.deterministic:
        return []
    if accelerator == "cpu":
        return [
            "deterministic: memory is filled before use; on CPUs, runs in one layout are bit-equal without it"
        ]
    return [
        "deterministic: kernels with a fixed order of summation replace faster ones (backward passes of"
        " attention and embedding, matrix products), memory is filled before use, and an operation"
        " without such a kernel stops the run with its name; the time estimate does not include this"
    ]


def _about_the_pipeline(
    config: RunConfig, layout: Layout, batch: Batch, shape: ModelShape, time: StepTime | None
) -> Iterator[str]:
    waiting = stages_waiting(layout.pipeline, layout.schedule, backward_passes(config))
    bubble = waiting / (batch.accumulation + waiting)
    if time is not None:  # it knows of ranks that share a processor, which others use while one waits
        bubble = min(bubble, time.bubble_fraction)
    if bubble > 0.3:
        yield (
            f"{format_count(batch.accumulation, 'micro-batch')} for {layout.pipeline} stages"
            f" leave{'s' if batch.accumulation == 1 else ''} each stage idle for {bubble:.0%} of the time;"
            f" {'a smaller --micro-batch or ' if batch.micro_batch > 1 else ''}a larger --global-batch helps"
        )
    sent = {part.what: part for part in traffic(config, shape, layout, batch)}
    if config.zero == 2 and layout.data_parallel > 1 and batch.accumulation > 1:
        gradients = sent["gradients"].bytes
        whole = max(trained_parameters(config, shape, layout, stage) for stage in range(layout.pipeline))
        yield (
            f"ZeRO-2 with a pipeline reduces gradients behind each of the {batch.accumulation} micro-batches:"
            f" {_size(gradients)} per step and rank, where --zero 1 sends {_size(gradients / batch.accumulation)}, once"
            f" per step; that holds a stage's gradients in full instead of 1/{layout.data_parallel} of them,"
            f" {_size(4 * whole * (1 - 1 / layout.data_parallel))} more"
        )
    if config.zero == 3 and layout.data_parallel > 1:
        yield (
            f"ZeRO-3 with a pipeline gathers each stage's parameters for each of the {batch.accumulation}"
            f" micro-batches, forward and backward: {_size(sent['weights'].bytes)} per step; --zero 2"
            f" gathers the updated ones once, and a stage already holds only 1/{layout.pipeline} of the model's weights"
        )
    if len(layout.hosts) > 1 and any(host.slots % layout.pipeline for host in layout.hosts):
        yield (
            f"pipelines span several hosts ({layout.hosts[0].slots} ranks on each, {layout.pipeline} stages):"
            f" {_size(sent['activations'].bytes)} of each rank's activations cross the network per step"
        )


def _size(number: float) -> str:
    return f"{number / 1e9:,.1f} GB" if number >= 1e8 else f"{number / 1e6:,.1f} MB"


def warnings_about_memory(
    config: RunConfig,
    layout: Layout,
    batch: Batch,
    shape: ModelShape,
    needs: Sequence[StageMemory],
    memory_bytes: int | None,
    accelerator: str,
) -> list[str]:
    """Where more memory is needed than there is, as the plan's verdict says: what takes it, and what helps."""
    if memory_bytes is None:
        return []
    needed, fullest = memory_needed(layout, needs, accelerator)
    if needed <= USABLE * memory_bytes:
        return []
    need = needs[fullest]
    return [_what_helps(config, layout, batch, shape, need, accelerator)]


def _what_helps(
    config: RunConfig,
    layout: Layout,
    batch: Batch,
    shape: ModelShape,
    need: StageMemory,
    accelerator: str,
) -> str:
    """The largest class of memory, and what makes it smaller."""
    classes = {
        name: getattr(need, name)
        for name in ("parameters", "gradients", "optimizer", "activations", "loss", "buffers")
    }
    largest = max(classes, key=lambda name: classes[name])
    shared = layout.data_parallel > 1
    more = 2 * layout.pipeline
    cuts = (
        shape.pipeline_refusal is None
        and count_chunks(more, layout.schedule) <= len(shape.layers)
        and layout.world_size % more == 0
    )
    stages = [f"--pipeline {more}"] if cuts else []
    smaller = ["a smaller --micro-batch"] if batch.micro_batch > 1 else []
    ways: list[str] = []
    if largest == "activations":
        if not config.activation_checkpointing:
            ways.append("--activation-checkpointing")
        ways += smaller
    elif largest == "loss":
        ways += smaller
    elif largest == "parameters":
        ways += ["--zero 3"] if shared and config.zero < 3 and config.schedule == "1f1b" else []
        ways += stages
    elif largest == "gradients":
        ways += ["--zero 2"] if shared and config.zero < 2 else []
        ways += stages
    else:
        ways += ["--zero 1"] if shared and config.zero == 0 else []
        if largest == "optimizer" and config.offload == "none" and accelerator != "cpu":
            ways.append("--offload cpu")
        ways += stages
    verb = "takes" if largest in ("optimizer", "loss") else "take"
    takes = f"{largest} {verb} most of the memory"
    # No other cut was found, or none was looked for: on CPUs ranks share the memory.
    if layout.pipeline > 1 and accelerator != "cpu":
        if config.partition == "auto":
            takes = f"no partition that fits was found; {takes}"
        else:
            ways.append("--partition auto, which searches for a partition that fits")
    ways = ways or ["more or larger devices, a smaller --seq-len or a smaller model"]
    return f"{takes}: {' or '.join(ways)} helps"


def warnings_about_balance(config: RunConfig, imbalance: float, without_limit: float) -> list[str]:
    """Where memory keeps the cut from being even.

    Args:
        imbalance: time of the slowest stage over the mean of all.
        without_limit: the same, if memory had no end.
    """
    if config.partition != "auto" or imbalance < 1.2 * without_limit:
        return []
    return [
        f"memory limits prevent an even partition: the slowest stage takes {imbalance:.2f} x the mean"
        f" instead of {without_limit:.2f} x; a smaller --micro-batch or --activation-checkpointing frees memory"
    ]


def warnings_about_time(
    config: RunConfig, shape: ModelShape, layout: Layout, batch: Batch, time: StepTime
) -> list[str]:
    """Where a step's time goes that another choice would save, in numbers."""
    found = []
    sent = {part.what: part for part in time.traffic}
    among = [sent[what] for what in ("weights", "gradients") if what in sent]
    lost = time.data_parallel / time.total
    if config.zero == 3 and lost > 0.05 and any(part.link == "between" for part in among):
        stages = " and stages inside each host (--pipeline)" if shape.pipeline_refusal is None else ""
        found.append(
            f"ZeRO-3 sends {_size(sum(part.bytes for part in among))} per step and rank between hosts,"
            f" which costs {lost:.0%} of the time; --zero 1{stages} sends less, and once per step"
        )
    talking = time.pipeline + time.data_parallel
    if talking > max(time.compute, 0.1 * time.total):
        if config.zero >= 2 and batch.accumulation > 1 and layout.data_parallel > 1:
            helps = "--zero 1 reduces gradients once per step, a larger --micro-batch less often"
        else:
            helps = "a larger --global-batch means more computation per reduction"
        found.append(
            f"a step is expected to communicate for {_seconds(talking)} and to compute for"
            f" {_seconds(time.compute)}; {helps}"
        )
    if config.offload != "none" and time.optimizer > 0.3 * time.total:
        found.append(
            f"the offloaded update is expected to take {_seconds(time.optimizer)} of a step's {_seconds(time.total)};"
            " a larger --global-batch means more computation per update"
        )
    return found


def warnings_about_devices(names: Sequence[str], device: Device | None, precision: str) -> list[str]:
    """Where no time can be estimated: what is not known."""
    if device is None and names and names[0]:
        return [
            f"no time estimate: the speed of {' and '.join(dict.fromkeys(names))} is unknown; describe it"
            " with dstrain plan --device FILE"
        ]
    if device is not None and precision not in device.flops:
        return [f"no time estimate: the speed of {device.name} in {precision} is unknown"]
    return []


def _seconds(number: float) -> str:
    return f"{number:.3g} s" if number >= 1 else f"{number * 1e3:.3g} ms"
