"""Refuses what can't be trained correctly, with the reason and the nearest thing that works."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from dstrain.config.loader import ResolvedConfig
from dstrain.config.schema import RunConfig
from dstrain.errors import DstrainError
from dstrain.lr_schedules import LR_SCHEDULES
from dstrain.optimizers import optimizer_facts
from dstrain.planning.attention import refuse_attention
from dstrain.planning.batch import Batch, make_batch
from dstrain.planning.deepspeed.composition import contradictions_of_config
from dstrain.planning.deepspeed.user_keys import mistakes
from dstrain.planning.hook_specs import refuse_profile
from dstrain.planning.layout import Layout, count_chunks
from dstrain.planning.model_shape import ModelShape
from dstrain.planning.partition import WORDS, blocks_of_chunks, even_blocks
from dstrain.plugins import is_code


@dataclass(frozen=True)
class Refusal:
    """Why a combination is not accepted, and what to do instead."""

    reason: str
    instead: str
    key: str


def refusal_of(
    *,
    zero: int,
    pipeline: int,
    precision: str = "fp32",
    schedule: str = "1f1b",
    offload: str = "none",
) -> Refusal | None:
    """The first reason against a combination of choices, if there is one.

    Source of each reason: measurements with DeepSpeed 0.19.8. What is accepted is trained in
    tests/distributed, row by row.
    """
    if zero == 0 and precision == "bf16":
        return Refusal(
            "bf16 with ZeRO-0 accumulates gradients in bf16 without a pipeline, and can't load its own"
            " checkpoints with one",
            "--zero 1, which keeps fp32 master weights and sends a quarter more bytes",
            "zero",
        )
    if zero == 0 and precision == "fp16":
        return Refusal(
            "DeepSpeed's fp16 with ZeRO-0 does not scale the loss but unscales the gradients: it trains"
            " another model",
            "--zero 1, which scales both",
            "zero",
        )
    if schedule == "dualpipev" and pipeline == 1:
        return Refusal(
            "--schedule dualpipev requires --pipeline 2 or more",
            "--pipeline 2 or more, or --schedule 1f1b",
            "schedule",
        )
    if schedule == "dualpipev" and zero == 3:
        return Refusal(
            "dualpipev alternates the backward passes of a rank's two stages, but DeepSpeed's ZeRO-3"
            " initialises the gradients of both in the first one of a step",
            "--zero 2 with dualpipev, or --schedule 1f1b with --zero 3",
            "schedule",
        )
    if schedule == "dualpipev" and zero == 2 and offload != "none":
        return Refusal(
            "DeepSpeed's ZeRO-2 hands offloaded gradients to the optimizer in the last backward pass of a"
            " step, which with dualpipev covers only one of a rank's two stages",
            "--zero 1 with dualpipev and offload, or --schedule 1f1b",
            "offload",
        )
    if offload != "none" and zero == 0:
        return Refusal(
            "only ZeRO's optimizers can offload their states",
            "--zero 1 (works with one replica too), or --offload none",
            "offload",
        )
    if offload == "nvme" and zero != 3:
        return Refusal(
            "DeepSpeed can offload optimizer states to disk with ZeRO-3 only",
            "--zero 3, or --offload cpu",
            "offload",
        )
    if offload == "nvme" and pipeline > 1:
        return Refusal(
            "with a pipeline, gradients would have to be read back from disk in each step for tied"
            " weights and the gradient norm",
            "--offload cpu, or --pipeline 1",
            "offload",
        )
    return None


def refuse(resolved: ResolvedConfig) -> None:
    """Refuse what no model, data or machine could make right. Raises DstrainError."""
    for error in refusals(resolved):
        raise error


def refusals(resolved: ResolvedConfig) -> list[DstrainError]:
    """All that `refuse` could say of a config: of each kind the first."""
    return [
        *_raised(resolved, _refuse_combination, _refuse_partition),
        *refusals_in_any_layout(resolved),
        *contradictions_of_config(resolved),
    ]


def refusals_in_any_layout(resolved: ResolvedConfig) -> list[DstrainError]:
    """Those of them that no other layout would fix."""
    of_choices = _raised(
        resolved,
        _refuse_keep_every,
        _refuse_elastic,
        refuse_attention,
        _refuse_nvme,
        _refuse_data_options,
        *(partial(_refuse_options, point) for point in _EXTENSION_POINTS),
        refuse_profile,
    )
    return [*of_choices, *mistakes(resolved)]


def _raised(resolved: ResolvedConfig, *checks: Callable[[ResolvedConfig], None]) -> list[DstrainError]:
    found = []
    for check in checks:
        try:
            check(resolved)
        except DstrainError as error:
            found.append(error)
    return found


def _refuse_combination(resolved: ResolvedConfig) -> None:
    config = resolved.config
    refusal = refusal_of(
        zero=config.zero,
        pipeline=config.pipeline,
        precision=config.precision,
        schedule=config.schedule,
        offload=config.offload,
    )
    if refusal:
        raise DstrainError(refusal.reason, where=str(resolved.origin(refusal.key)), hint=refusal.instead)


def refuse_batch(resolved: ResolvedConfig) -> None:
    """Where the number of replicas is chosen, the batch can be divided without knowing the machines.

    A plan looks at the machines first: whether they hold so many replicas matters more. Raises DstrainError.
    """
    config = resolved.config
    if config.data_parallel is not None:
        make_batch(
            global_batch=config.global_batch,
            micro_batch=config.micro_batch,
            data_parallel=config.data_parallel,
            pipeline=config.pipeline,
            seq_len=config.seq_len,
            where=str(resolved.origin("micro_batch")),
            where_global=str(resolved.origin("global_batch")),
        )


def _refuse_nvme(resolved: ResolvedConfig) -> None:
    config = resolved.config
    if config.offload == "nvme" and not config.nvme_path:
        raise DstrainError(
            "--offload nvme requires nvme_path, a folder on a local disk",
            where=str(resolved.origin("offload")),
            hint="--set nvme_path=/local/disk/folder",
        )


def _refuse_data_options(resolved: ResolvedConfig) -> None:
    config = resolved.config
    if config.data_options and not is_code(config.data):
        raise DstrainError(
            f"data_options ({', '.join(config.data_options)}) are for a dataset of your own, and {config.data} is none",
            where=str(resolved.origin("data_options", next(iter(config.data_options)))),
            hint="remove them, or name a dataset of your own: --data my_module:my_documents",
        )


@dataclass(frozen=True)
class _ExtensionPoint:
    """A key that names something built in, or ``module:name`` with options.

    Attributes:
        key: of the config; its options stand in ``KEY_options``.
        what: the user's own, for messages.
        passed: what dstrain itself passes to it.
        takes: the config keys for a built-in one of this name.
    """

    key: str
    what: str
    passed: tuple[str, ...]
    takes: Callable[[str], tuple[str, ...]]


_EXTENSION_POINTS = (
    _ExtensionPoint("loss", "a loss function", ("logits", "labels"), lambda name: ()),
    _ExtensionPoint(
        "optimizer",
        "an optimizer",
        ("params", "lr", "weight_decay"),
        lambda name: ("lr", *optimizer_facts(name).takes),
    ),
    _ExtensionPoint(
        "lr_schedule",
        "a schedule",
        ("step", "steps"),
        lambda name: ("lr", "warmup_steps", *LR_SCHEDULES[name].takes),
    ),
)


def _refuse_options(point: _ExtensionPoint, resolved: ResolvedConfig) -> None:
    """Refuse options of what is built in, and those that dstrain passes itself. Raises DstrainError."""
    name, key = str(getattr(resolved.config, point.key)), f"{point.key}_options"
    options = getattr(resolved.config, key)
    if options and not is_code(name):
        keys = point.takes(name)
        raise DstrainError(
            f"{key} ({', '.join(options)}) are for {point.what} of your own, and {name} takes"
            f" {'keys of the config' if keys else 'none'}",
            where=str(resolved.origin(key, next(iter(options)))),
            hint=f"the keys of {name}: {', '.join(keys)}" if keys else f"remove {key}",
        )
    for passed in point.passed:
        if passed in options:
            raise DstrainError(
                f"{passed} is passed to {name} by dstrain, and can't stand in {key}",
                where=str(resolved.origin(key, passed)),
                hint=f"the config's own key: --set {passed}=..."
                if passed in RunConfig.model_fields
                else "remove it",
            )


def _refuse_keep_every(resolved: ResolvedConfig) -> None:
    config = resolved.config
    if config.keep_every and not config.saves:
        raise DstrainError(
            "--keep-every can't be combined with save_every: never, which makes no checkpoints",
            where=str(resolved.origin("keep_every")),
            hint="--save-every 0 saves only those and the last one; or remove --keep-every",
        )


def _refuse_elastic(resolved: ResolvedConfig) -> None:
    config = resolved.config
    if config.elastic and not config.restarts:
        raise DstrainError(
            "--elastic requires --restarts N",
            where=str(resolved.origin("elastic")),
            hint="add --restarts N",
        )


def _refuse_partition(resolved: ResolvedConfig) -> None:
    """Refuse a ``partition`` that is neither a word nor a number for each chunk. Raises DstrainError."""
    config = resolved.config
    where = str(resolved.origin("partition"))
    if config.partition in WORDS:
        return
    blocks = blocks_of_chunks(config.partition)
    if blocks is None:
        near = difflib.get_close_matches(config.partition.strip().lower(), WORDS, n=1)
        raise DstrainError(
            f"unknown partition {config.partition!r}",
            where=where,
            hint=(
                f"did you mean {near[0]}?"
                if near
                else "auto, parameters, uniform, or the number of blocks of each stage: 5,5,5,1"
            ),
        )
    chunks = count_chunks(config.pipeline, config.schedule)
    if len(blocks) != chunks:
        each = "two a rank with dualpipev" if chunks > config.pipeline else "one a stage"
        raise DstrainError(
            f"{config.partition} has {_numbers(len(blocks))}, but --pipeline {config.pipeline} needs {chunks} ({each})",
            where=where,
            hint=f"--partition {','.join(['4'] * chunks)} for {4 * chunks} blocks, or --partition auto",
        )
    empty = [chunk for chunk in range(1, chunks - 1) if blocks[chunk] == 0]
    if empty:
        raise DstrainError(
            f"{config.partition} leaves stage {empty[0] + 1} of {chunks} without a layer",
            where=where,
            hint="only the first, which holds the embedding, and the last, which holds the head, may have 0 blocks",
        )


def _numbers(count: int) -> str:
    return f"{count} number{'s' if count != 1 else ''}"


def check_partition(resolved: ResolvedConfig, shape: ModelShape) -> None:
    """Refuse numbers of blocks that are not those of the model. Raises DstrainError."""
    asked = blocks_of_chunks(resolved.config.partition)
    blocks = sum(layer.kind == "block" for layer in shape.layers)
    if asked is not None and sum(asked) != blocks:
        example = ",".join(map(str, even_blocks(blocks, len(asked))))
        raise DstrainError(
            f"{resolved.config.partition} has {sum(asked)} blocks in total, but the model has {blocks}",
            where=str(resolved.origin("partition")),
            hint=f"for example --partition {example} (embedding and head are not counted), or --partition auto",
        )


def check_precision(resolved: ResolvedConfig, precisions: tuple[str, ...], accelerator: str) -> None:
    """Refuse a precision that the devices can't compute in. Raises DstrainError."""
    precision = resolved.config.precision
    if precision not in precisions:
        raise DstrainError(
            f"this {accelerator} can't compute in {precision}",
            where=str(resolved.origin("precision")),
            hint=f"--precision {' or '.join(precisions)}",
        )


def check_layerdrop(resolved: ResolvedConfig, shape: ModelShape, layout: Layout) -> None:
    """Refuse replicas that would each drop other layers. Raises DstrainError."""
    if shape.layerdrop and layout.data_parallel > 1:
        raise DstrainError(
            f"{shape.model_type} drops whole layers at random (layerdrop {shape.layerdrop:g}), and each"
            " replica drops others: they would not reduce the same gradients",
            where=str(resolved.origin("data_parallel")),
            hint="layerdrop: 0 in the model's config.json, or --data-parallel 1",
        )


def check_rows(resolved: ResolvedConfig, shape: ModelShape, batch: Batch) -> None:
    """Refuse micro-batches whose samples depend on each other. Raises DstrainError."""
    if shape.row_leak and batch.micro_batch > 1:
        raise DstrainError(
            f"samples can't share a micro-batch: {shape.row_leak}, so it would train another model with"
            " micro-batches of another size",
            where=str(resolved.origin("micro_batch" if resolved.config.micro_batch else "model")),
            hint="--micro-batch 1",
        )


def check_batch(resolved: ResolvedConfig, batch: Batch) -> None:
    """Refuse fewer micro-batches than the schedule needs. Raises DstrainError."""
    config = resolved.config
    needed = 2 * config.pipeline
    if config.schedule == "dualpipev" and batch.accumulation < needed:
        raise DstrainError(
            f"dualpipev over {config.pipeline} stages requires {needed} micro-batches per step, but there"
            f" are {batch.accumulation}",
            where=str(resolved.origin("schedule")),
            hint=f"--global-batch {needed * batch.micro_batch * batch.data_parallel} or more,"
            " a smaller --micro-batch, or --schedule 1f1b",
        )


def _refuse_unseparated(shape: ModelShape, resolved: ResolvedConfig) -> None:
    """Refuse models whose tokens see others that they must not see. Raises DstrainError."""
    config = resolved.config
    if shape.looks_ahead:
        raise DstrainError(
            f"{shape.looks_ahead}, so it would learn to copy them instead of predicting them",
            where=str(resolved.origin("model")),
            hint="a causal model; some families become one by is_decoder: true in their config.json",
        )
    flash = config.attention.startswith("flash")
    leak = shape.flash_packing_leak if flash else shape.packing_leak
    if config.pack and leak:
        raise DstrainError(
            f"documents can't share a sample: {leak}",
            where=str(resolved.origin("model")),
            hint="--no-pack, which gives each document its own samples"
            + (", or --set attention=auto" if flash and not shape.packing_leak else ""),
        )


def check_model(shape: ModelShape, resolved: ResolvedConfig, data_vocabulary: int) -> None:
    """Refuse what this model can't do. Raises DstrainError."""
    config = resolved.config
    if config.pipeline > 1 and shape.pipeline_refusal:
        raise DstrainError(
            f"{shape.model_type} can't be split into stages: {shape.pipeline_refusal}",
            where=str(resolved.origin("pipeline")),
            hint="--pipeline 1, with --zero 1 to 3 to share memory between replicas",
        )
    chunks = count_chunks(config.pipeline, config.schedule)
    if chunks > len(shape.layers):
        per_rank = " (two a rank with dualpipev)" if chunks > config.pipeline else ""
        raise DstrainError(
            f"{chunks} stages{per_rank} are more than the model's {len(shape.layers)} layers"
            f" (embedding, {len(shape.layers) - 2} blocks, head)",
            where=str(resolved.origin("pipeline")),
            hint=f"--pipeline {len(shape.layers) * config.pipeline // chunks} or less,"
            " and --data-parallel for the other devices",
        )
    _refuse_unseparated(shape, resolved)
    if data_vocabulary > shape.vocab_size:
        raise DstrainError(
            f"the tokenizer has {data_vocabulary} tokens, but the model's embedding only {shape.vocab_size}",
            where=str(resolved.origin("tokenizer")),
            hint=f"raise vocab_size in the model's config.json to {data_vocabulary} or more,"
            " or name the model's own tokenizer",
        )
    if shape.max_positions is not None and config.seq_len > shape.max_positions:
        raise DstrainError(
            f"seq_len {config.seq_len} exceeds the model's {shape.max_positions} positions",
            where=str(resolved.origin("seq_len")),
            hint=f"--seq-len {shape.max_positions} or less",
        )
