"""Estimates the memory of weights, gradients and optimizer states of a rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dstrain.config.schema import RunConfig
from dstrain.estimate.memory_peaks import Moments, host_beside_optimizer, moments_of_step
from dstrain.estimate.stage_parameters import PACKED_BYTES, Stage, moment_bytes, weight_bytes


@dataclass(frozen=True)
class StateBytes:
    """Bytes of one parameter's states on one rank, and of a frozen one's."""

    trained: float
    frozen: float


def state_bytes(
    config: RunConfig, replicas: int, *, device_is_host: bool = False, gradient: int | None = None
) -> StateBytes:
    """Parameters, gradients and optimizer states of one parameter on one rank.

    In 16 bits with AdamW: 2 + 2 + 12, of which ZeRO-1 shards the 12 across the replicas, ZeRO-2 the gradients'
    2 too, ZeRO-3 all. In fp32 DeepSpeed's ZeRO keeps a second fp32 copy of the weights as well.

    Args:
        device_is_host: on CPUs offloaded states stay in the same memory.
        gradient: bytes of a gradient, where it is not held in the precision of the weights: 4 in dstrain's runs.

    Source: Rajbhandari et al. 2020, ZeRO: Memory Optimizations Toward Training Trillion Parameter Models, figure 1.
    """
    weight = weight_bytes(config)
    moments = moment_bytes(config)
    offloaded = config.offload != "none" and not device_is_host
    parameters = weight / (replicas if config.zero == 3 else 1)
    gradients = (gradient or weight) / (replicas if config.zero >= 2 else 1)
    optimizer = (moments + 4 * (config.zero > 0)) / (replicas if config.zero >= 1 else 1)
    if offloaded:
        optimizer = 0.0
        # In 16 bits ZeRO-2 adds them up on the device, and hands over the sum.
        gradients = (
            0.0 if config.zero == 3 or (config.zero == 2 and config.precision == "fp32") else gradients
        )
    return StateBytes(parameters + gradients + optimizer, parameters)


@dataclass(frozen=True)
class States:
    """Bytes of a rank's weights and states, at all moments and at some."""

    parameters: int
    optimizer: int
    host: int
    moments: Moments


def states(
    config: RunConfig,
    stage: Stage,
    accelerator: str,
    zero_options: Mapping[str, Any],
    *,
    several: bool,
    later: bool,
) -> States:
    """Of one rank.

    Args:
        several: whether there are several micro-batches.
        later: whether gradients of earlier micro-batches are there when all activations are.
        accelerator: ``cuda`` or ``cpu``, where what is offloaded stays in the same memory, gloo's reductions copy,
            and the optimizers take one tensor after the other, with two temporaries of it for AdamW.
        zero_options: ``zero_optimization`` of the composed JSON, as far as it is known.
    """
    held = stage.trained + stage.frozen
    shards = stage.replicas if config.zero == 3 else 1
    # ZeRO-3 shards packed weights too, but not their scales, which are no parameters.
    packed = PACKED_BYTES * stage.quantized if config.zero == 3 else 0
    parameters = (
        weight_bytes(config) * -(-(held - stage.quantized) // shards)
        + round(packed / shards - packed)
        + stage.quantized_bytes
    )
    share = stage.trained if config.zero == 0 else -(-stage.trained // stage.replicas)
    optimizer = (moment_bytes(config) + 4 * (config.zero > 0)) * share
    host = 0
    if config.offload != "none" and accelerator != "cpu":
        host = optimizer + host_beside_optimizer(config, stage, share)
        optimizer = 0
    return States(
        parameters=parameters,
        optimizer=optimizer,
        host=host,
        moments=moments_of_step(
            config, stage, share, accelerator, zero_options, several=several, later=later
        ),
    )
