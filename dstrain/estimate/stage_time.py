"""Estimates the relative time of layers and stages, in FLOPs.

Matrix multiplications are counted, at one rate for all; norms, activation functions, the optimizer and what is sent
are not.
"""

from __future__ import annotations

from collections.abc import Sequence

from dstrain.config.schema import RunConfig
from dstrain.planning.layout import Layout
from dstrain.planning.model_shape import Layer, ModelShape


def layer_times(
    shape: ModelShape,
    *,
    seq_len: int,
    attended: float = 1.0,
    blocks_recomputed: bool = False,
    head_recomputed: bool = False,
) -> tuple[int, ...]:
    """Forward, backward and recomputation of each layer for one sample, in FLOPs.

    The backward pass takes twice the forward pass: gradients of the input and of the weights. Where adapters are
    trained, the weights' own gradients are left out. What is recomputed runs forward once more. An embedding looks its
    rows up, which is next to nothing.

    Args:
        attended: fraction of the square of positions that attention computes, see `attended_share`.
        blocks_recomputed: ``activation_checkpointing``.
        head_recomputed: its loss works in chunks, see `dstrain.planning.buffer_sizes`.

    Source: Narayanan et al. 2021, Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM,
    appendix.
    """

    def passes(layer: Layer) -> int:
        again = {"block": blocks_recomputed, "head": head_recomputed}.get(layer.kind, False)
        return 4 if again else 3

    def left_out(layer: Layer) -> int:
        if not shape.has_adapters or not layer.parameters:
            return 0
        return round(
            seq_len * layer.forward_flops_per_token * (1 - layer.adapter_parameters / layer.parameters)
        )

    # One FLOP is added: a layer that computes nothing (an embedding) must still count.
    return tuple(
        1 + passes(layer) * round(layer.forward_flops(seq_len, attended)) - left_out(layer)
        for layer in shape.layers
    )


def attended_share(config: RunConfig) -> float:
    """Fraction of the square of positions that attention computes for a causal model.

    Flash and varlen attention leave out what lies behind a position, and so does sdpa without a mask. Packed documents
    need a mask with sdpa, and its kernels then compute all of it. A sliding window is counted as if it had no end.
    """
    causal_kernel = config.attention.startswith(("flash", "varlen")) or (
        config.attention in ("auto", "sdpa") and not config.pack
    )
    return 0.5 if causal_kernel else 1.0


def stage_shares(layout: Layout, times: Sequence[float]) -> tuple[float, ...]:
    """The time of each stage over the mean of all: all 1.0 is perfect. With dualpipev both chunks count."""
    stages = [
        sum(times[layer] for chunk in layout.chunks(s) for layer in chunk) for s in range(layout.pipeline)
    ]
    return tuple(stage * len(stages) / sum(stages) for stage in stages)
