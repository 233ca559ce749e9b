"""Attention implementations, and the devices and precisions that each supports."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import replace

from dstrain.config.loader import ResolvedConfig
from dstrain.errors import DstrainError
from dstrain.planning.model_shape import ModelShape

VARLEN = "varlen"
"""torch's own flash attention for rows of several documents: `dstrain.model.varlen_attention`."""

VARLEN_TORCH = (2, 13)
"""The version of torch from which on it has what is needed: groups of queries, and windows."""

FLASH_PACKAGES = {
    "flash_attention_2": "flash_attn",
    "flash_attention_3": "flash_attn_interface",
    VARLEN: "torch>={}.{}".format(*VARLEN_TORCH),
}
"""The Python package that holds the kernels of each kind of flash attention."""

ATTENTIONS = ("auto", "sdpa", "eager", "flex_attention", *FLASH_PACKAGES)
"""What ``attention`` may say: transformers' own names, and auto."""


def refuse_attention(resolved: ResolvedConfig) -> None:
    """Refuse what is no attention implementation. Raises DstrainError."""
    attention = resolved.config.attention
    if attention not in ATTENTIONS:
        near = difflib.get_close_matches(attention.strip().lower(), ATTENTIONS, n=1, cutoff=0.5)
        raise DstrainError(
            f"unknown attention implementation {attention!r}",
            where=str(resolved.origin("attention")),
            hint=f"did you mean {near[0]}?" if near else f"one of: {', '.join(ATTENTIONS)}",
        )


def with_chosen_attention(
    resolved: ResolvedConfig,
    shape: ModelShape,
    accelerator: str,
    precisions: Sequence[str],
    packages: Sequence[str],
) -> ResolvedConfig:
    """The config with the implementation that is computed with, for what is decided and estimated by it.

    In place of ``auto`` it has the best for these devices and this family.

    Without a GPU that is sdpa where the family has it, else eager. So it is with dropout, which varlen attention does
    not have.

    Args:
        precisions: what the devices can compute in. Those that have bf16 are those that the kernel is for.
        packages: the installed ones of ``FLASH_PACKAGES``.
    """
    config = resolved.config
    if config.attention != "auto":
        return resolved
    kernel = accelerator == "cuda" and "bf16" in precisions and config.precision != "fp32"
    fits = VARLEN not in shape.attention_refusals and not shape.dropout
    if kernel and fits and FLASH_PACKAGES[VARLEN] in packages:
        chosen = VARLEN
    else:
        chosen = "eager" if "sdpa" in shape.attention_refusals else "sdpa"
    return replace(resolved, config=config.model_copy(update={"attention": chosen}))


def check_attention(resolved: ResolvedConfig, accelerator: str, packages: Sequence[str]) -> None:
    """Refuse flash and flex attention where their kernels don't run.

    Args:
        packages: the installed ones of ``FLASH_PACKAGES``.

    Raises:
        DstrainError: not on this accelerator, not in this precision, or its package is not installed.
    """
    config = resolved.config
    if config.attention == "flex_attention" and accelerator != "cuda":
        raise DstrainError(
            f"flex_attention computes gradients on CUDA devices only, but the run is on {accelerator}",
            where=str(resolved.origin("attention")),
            hint="--set attention=auto",
        )
    package = FLASH_PACKAGES.get(config.attention)
    if package is None:
        return
    where = str(resolved.origin("attention"))
    if accelerator != "cuda":
        raise DstrainError(
            f"{config.attention} has kernels for CUDA devices only, but the run is on {accelerator}",
            where=where,
            hint="--set attention=auto",
        )
    if config.precision == "fp32":
        raise DstrainError(
            f"{config.attention} has kernels for bf16 and fp16 only, but the run is in fp32",
            where=where,
            hint="--precision bf16, or --set attention=auto",
        )
    if package not in packages:
        raise DstrainError(
            f"{config.attention} needs the Python package {package}, which is not installed",
            where=where,
            hint="install it, or --set attention=auto",
        )
