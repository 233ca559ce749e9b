"""Keeps the precision of buffers when a module is cast."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn

Result = TypeVar("Result")


def keep_buffer_types(module: nn.Module, apply: Callable[[], Result]) -> Result:
    """Run ``apply`` (a move or a cast of ``module``) without rounding its float buffers.

    ``module.to(torch.bfloat16)``, as DeepSpeed's engines call it, would round rotary tables, embedding
    scales and router corrections, which Hugging Face keeps in fp32.
    """
    before = [
        (child, name, buffer)
        for child in module.modules()
        for name, buffer in child._buffers.items()
        if buffer is not None and buffer.is_floating_point()
    ]
    result = apply()
    for child, name, buffer in before:
        after = child._buffers[name]
        if after is not None and after.dtype != buffer.dtype:
            child._buffers[name] = buffer.to(after.device)
    return result
