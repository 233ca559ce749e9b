"""Refuses what this model or these devices can't train, with the reason and the nearest thing that works."""

from __future__ import annotations

from dstrain.config.loader import ResolvedConfig
from dstrain.errors import DstrainError
from dstrain.planning.attention import VARLEN
from dstrain.planning.batch import Batch
from dstrain.planning.layout import Layout, count_chunks
from dstrain.planning.model_shape import ModelShape
from dstrain.planning.partition import blocks_of_chunks, even_blocks


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


def check_quantized(resolved: ResolvedConfig, shape: ModelShape) -> None:
    """Refuse to train quantized weights themselves, and what bitsandbytes' 8-bit layers can't do. Raises DstrainError.

    Source: ``MatMul8bitLt`` and ``Linear8bitLt`` of bitsandbytes 0.50.
    """
    config = resolved.config
    if shape.bits is not None and not shape.has_adapters and config.init == "pretrained":
        raise DstrainError(
            f"the model's weights are quantized to {shape.bits} in its files: only an adapter can be trained",
            where=str(resolved.origin("model")),
            hint="--adapter lora, or name a folder with the model's unquantized weights",
        )
    if shape.bits != "8bit":
        return
    if config.zero == 3:
        raise DstrainError(
            "bitsandbytes holds 8-bit weights where ZeRO-3 can't shard them",
            where=str(resolved.origin("zero")),
            hint="adapter.base: 4bit, --zero 2, or --pipeline, which cuts the model's layers apart",
        )
    if config.activation_checkpointing:
        raise DstrainError(
            "bitsandbytes keeps the inputs of 8-bit layers until the backward pass, so that recomputation would save"
            " none of them",
            where=str(resolved.origin("activation_checkpointing")),
            hint="adapter.base: 4bit, or --no-activation-checkpointing",
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


def _refuse_attention(shape: ModelShape, resolved: ResolvedConfig) -> None:
    """Refuse an attention implementation that the family does not have. Raises DstrainError."""
    attention = resolved.config.attention
    reason = shape.attention_refusals.get(attention)
    if attention == VARLEN and shape.dropout:
        reason = f"it has no dropout, and the model's config.json has {shape.dropout:g}"
    if reason is None:
        return
    works = [name for name in ("sdpa", "eager") if name not in shape.attention_refusals]
    raise DstrainError(
        f"{shape.model_type} can't have attention: {attention}: {reason}",
        where=str(resolved.origin("attention")),
        hint=f"--set attention={works[0]}, which is what auto takes" if works else "--set attention=auto",
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
    _refuse_attention(shape, resolved)
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
