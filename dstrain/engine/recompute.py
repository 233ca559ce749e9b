"""Activation checkpointing: drops a layer's activations and recomputes them in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.checkpoint import checkpoint


def recompute(function: Callable[..., Any], *inputs: Any) -> Any:
    """torch's non-reentrant checkpoint, for both engines.

    DeepSpeed's own two forms are not used: the reentrant one, its default, cuts off the gradient of an
    embedding inside it, and its non-reentrant one does not gather ZeRO-3's parameters again.
    """
    return checkpoint(function, *inputs, use_reentrant=False)
