"""What can't be trained rightly is refused here, with the reason and the nearest thing that works."""

from __future__ import annotations

from dataclasses import dataclass

from dstrain.config.loader import ResolvedConfig
from dstrain.errors import DstrainError
from dstrain.plan.shape import ModelShape


@dataclass(frozen=True)
class Refusal:
    """Why a combination is not accepted, and what to do instead."""

    reason: str
    instead: str
    key: str


def refuse_layout(*, zero: int, pipeline: int, precision: str) -> Refusal | None:
    """The first reason against a combination of ZeRO stage, pipeline and precision, if there is one.

    Source of each reason: measurements with DeepSpeed 0.19.8, each repeated in tests/distributed.
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
    if zero == 3 and pipeline > 1:
        return Refusal(
            "ZeRO-3 gathers each layer's parameters by collectives of the whole world, which stages that"
            " work on different layers at one time can't join",
            "--zero 2 with the pipeline (each stage already holds only its own layers), or --zero 3 with"
            " --pipeline 1",
            "zero",
        )
    return None


def check_model(shape: ModelShape, resolved: ResolvedConfig, data_vocabulary: int) -> None:
    """Refuse what this model can't do. Raises DstrainError."""
    config = resolved.config
    if config.pipeline > 1 and shape.pipeline_refusal:
        raise DstrainError(
            f"{shape.model_type} can't be split into stages: {shape.pipeline_refusal}",
            where=str(resolved.origin("pipeline")),
            hint="--pipeline 1, with --zero 1 to 3 to share memory between replicas",
        )
    if config.pipeline > len(shape.layers):
        raise DstrainError(
            f"{config.pipeline} stages are more than the model's {len(shape.layers)} layers"
            f" (embedding, {len(shape.layers) - 2} blocks, head)",
            where=str(resolved.origin("pipeline")),
            hint=f"--pipeline {len(shape.layers)} or less, and --data-parallel for the other devices",
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
