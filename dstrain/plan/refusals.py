"""What can't be trained rightly is refused here, with the reason and the nearest thing that works."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from dstrain.config.loader import ResolvedConfig
from dstrain.errors import DstrainError
from dstrain.plan.batch import Batch
from dstrain.plan.layout import Layout, count_spans
from dstrain.plan.shape import ModelShape


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
            "--zero 1, which keeps fp32 master weights and sends no more bytes",
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
            "dualpipev is an order of work between stages, and there is one stage",
            "--pipeline 2 or more, or --schedule 1f1b",
            "schedule",
        )
    if schedule == "dualpipev" and zero == 3:
        return Refusal(
            "dualpipev runs the backward passes of a rank's two stages in turn, and DeepSpeed's ZeRO-3 takes"
            " the first one of a step to start the gradients of both",
            "--zero 2 with dualpipev, or --schedule 1f1b with --zero 3",
            "schedule",
        )
    if schedule == "dualpipev" and zero == 2 and offload != "none":
        return Refusal(
            "DeepSpeed's ZeRO-2 hands offloaded gradients to the optimizer in the last backward pass of a step,"
            " and with dualpipev that one is of one of a rank's two stages only",
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
            "DeepSpeed keeps optimizer states on disk for ZeRO-3 only",
            "--zero 3, or --offload cpu",
            "offload",
        )
    if offload == "nvme" and pipeline > 1:
        return Refusal(
            "with stages, the gradients of tied weights and the whole model's norm would have to be read back"
            " from the disk at each step",
            "--offload cpu, or --pipeline 1",
            "offload",
        )
    return None


def refuse(resolved: ResolvedConfig) -> None:
    """Refuse what no model, data or machine could make right. Raises DstrainError."""
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
    if config.offload == "nvme" and not config.nvme_path:
        raise DstrainError(
            "offload: nvme needs a folder on a local disk",
            where=str(resolved.origin("offload")),
            hint="--set nvme_path=/local/disk/folder",
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


def check_frozen(resolved: ResolvedConfig, shape: ModelShape, layout: Layout) -> None:
    """Refuse a pattern that freezes nothing, and a stage that would have nothing to train.

    Raises DstrainError.
    """
    names = [name for layer in shape.layers for name in layer.tensors]
    where = str(resolved.origin("freeze"))
    for pattern in resolved.config.freeze:
        if names and not any(fnmatchcase(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.3)
            raise DstrainError(
                f"freeze: no parameter of {shape.model_type} is called {pattern!r}",
                where=where,
                hint=f"names are like {near[0] if near else names[0]}; * stands for anything",
            )
    # The names of one tied weight differ from layer to layer: frozen by one, it is frozen by all.
    frozen = {name for name in names if is_frozen(name, resolved.config.freeze)}
    for tied in shape.tied:
        owned = {name for layer in tied.layers for name in shape.layers[layer].tensors if name in tied.names}
        if owned & frozen:
            frozen |= owned
    for stage in range(layout.pipeline):
        held = [
            name for span in layout.spans(stage) for layer in span for name in shape.layers[layer].tensors
        ]
        if held and frozen.issuperset(held):
            raise DstrainError(
                f"stage {stage} would hold only frozen parameters, and DeepSpeed needs one to train on each",
                where=where,
                hint="fewer --pipeline stages, so that each has a layer that is trained, or freeze less",
            )


def is_frozen(name: str, patterns: Sequence[str]) -> bool:
    """Whether a parameter of this Hugging Face name is frozen."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def check_batch(resolved: ResolvedConfig, batch: Batch) -> None:
    """Refuse fewer micro-batches than the schedule needs. Raises DstrainError."""
    config = resolved.config
    needed = 2 * config.pipeline
    if config.schedule == "dualpipev" and batch.accumulation < needed:
        raise DstrainError(
            f"dualpipev over {config.pipeline} stages needs {needed} micro-batches a step,"
            f" and there are {batch.accumulation}",
            where=str(resolved.origin("schedule")),
            hint=f"--global-batch {needed * batch.micro_batch * batch.data_parallel} or more,"
            " a smaller --micro-batch, or --schedule 1f1b",
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
    spans = count_spans(config.pipeline, config.schedule)
    if spans > len(shape.layers):
        per_rank = " (two a rank with dualpipev)" if spans > config.pipeline else ""
        raise DstrainError(
            f"{spans} stages{per_rank} are more than the model's {len(shape.layers)} layers"
            f" (embedding, {len(shape.layers) - 2} blocks, head)",
            where=str(resolved.origin("pipeline")),
            hint=f"--pipeline {len(shape.layers) * config.pipeline // spans} or less,"
            " and --data-parallel for the other devices",
        )
    if data_vocabulary > shape.vocab_size:
        raise DstrainError(
            f"the tokenizer has {data_vocabulary} tokens and the model's embedding {shape.vocab_size}",
            where=str(resolved.origin("tokenizer")),
            hint=f"raise vocab_size in the model's config.json to {data_vocabulary} or more,"
            " or name the model's own tokenizer",
        )
    if shape.max_positions is not None and config.seq_len > shape.max_positions:
        raise DstrainError(
            f"seq_len {config.seq_len} is more than the model's {shape.max_positions} positions",
            where=str(resolved.origin("seq_len")),
            hint=f"--seq-len {shape.max_positions} or less",
        )
