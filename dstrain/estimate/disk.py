"""How much disk space a run's checkpoints need, and whether it is available."""

from __future__ import annotations

import math

from dstrain.config.schema import RunConfig
from dstrain.errors import DstrainError
from dstrain.estimate.stage_parameters import frozen_parameters, moment_bytes
from dstrain.formatting import format_bytes
from dstrain.lora import is_adapter_parameter
from dstrain.planning.layout import Layout
from dstrain.planning.model_shape import ModelShape

# Beside the numbers themselves, measured with DeepSpeed 0.19.8: two scripts that it lays beside the state, each rank's
# files, and the name, shape and place of each tensor. A weight's take more in a file of all layers than in one of a
# single layer; the optimizer's tensors have some where they are not laid flat, as they are with ZeRO.
_SCRIPTS, _OF_A_RANK = 41_000, 12_000
_OF_A_WEIGHT, _OF_A_WEIGHT_IN_STAGES, _OF_A_STATE = 640, 420, 320


def checkpoint_bytes(config: RunConfig, shape: ModelShape, layout: Layout, accelerator: str) -> int:
    """Bytes of one checkpoint, all ranks' files together.

    Weights in the precision that is computed with (not with ZeRO-3, whose weights are the masters rounded);
    with ZeRO an fp32 master of each trained parameter; the optimizer's moments. Frozen parameters are written
    a second time with ZeRO, except where both copies are the same memory and one file (no stages, on a CPU); not at
    all where adapters are trained. A tied weight counts in each layer's file, and in the optimizer of each stage that
    holds it. Compared with real checkpoints in tests/distributed/test_saving.py; the swap files of ``offload: nvme``
    are taken to hold what the files of ZeRO-3 hold.
    """
    weight = 4 if config.precision == "fp32" else 2
    stages = [layout.chunks(stage) for stage in range(layout.pipeline)]
    held = sum(shape.parameters_of(chunks) for chunks in stages)
    frozen = sum(frozen_parameters(shape, chunks, config.freeze) for chunks in stages)
    # One file a layer with stages: two layers that share a weight both write it.
    weights = sum(layer.parameters for layer in shape.layers) if layout.pipeline > 1 else held
    total = (moment_bytes(config) + 4 * (config.zero > 0)) * (held - frozen)
    total += weight * weights * (config.zero < 3)
    if config.zero and (config.zero == 3 or layout.pipeline > 1 or accelerator != "cpu"):
        total += weight * frozen
    tensors = sum(len(layer.tensors) for layer in shape.layers)
    ranks = layout.world_size if config.zero else layout.pipeline
    if shape.has_adapters:
        total = (moment_bytes(config) + 4 * (config.zero > 0) + weight * (config.zero < 3)) * (held - frozen)
        tensors = sum(is_adapter_parameter(name) for layer in shape.layers for name in layer.tensors)
        tensors *= (
            layout.data_parallel if config.zero == 3 else 1
        )  # small ones, which each replica's file names
    of_a_tensor = _OF_A_WEIGHT if layout.pipeline == 1 else _OF_A_WEIGHT_IN_STAGES
    if not config.zero:
        of_a_tensor += _OF_A_STATE * (moment_bytes(config) // 4 + 1)  # and a count of steps
    return total + _SCRIPTS * (config.zero > 0) + _OF_A_RANK * ranks + of_a_tensor * tensors


def disk_bytes(config: RunConfig, one: int, parameters: int) -> int:
    """Bytes of all that a run leaves on its disk at once, at most.

    Args:
        one: bytes of a checkpoint.
        parameters: of all stages, which ``save_weights`` writes in fp32.
    """
    return one * most_checkpoints(config) + 4 * parameters * config.save_weights


def most_checkpoints(config: RunConfig) -> int:
    """How many lie on the disk at once, at most: those for good, the newest, and the one that is being written.

    A run that is stopped in order saves at one more step; the disk is looked at anew when it is resumed.
    """
    if not config.saves:
        return 0
    last, good = config.steps, config.keep_every
    # By the clock any step may be saved, as far as the plan can know.
    every = config.save_every if isinstance(config.save_every, int) else 1
    for_good = last // good if good else 0
    passing = last // every if every else 0
    if every and good:
        passing -= last // math.lcm(every, good)
    if not any(n and last % n == 0 for n in (every, good)):
        passing += 1  # the last step is always saved
    return for_good + min(config.keep + 1, passing)


def check_disk(*, needed: int, one: int, free: int, held: int, where: str) -> None:
    """Refuse a run whose checkpoints do not fit.

    Args:
        needed: bytes of all that lie there at once.
        one: bytes of one.
        free: bytes that the disk has left.
        held: bytes of the run's checkpoints that lie there already, and will be replaced or are counted in.
        where: the folder on that disk.

    Raises:
        DstrainError: with the numbers, and what to change.
    """
    if needed <= free + held:
        return
    fitting = (free + held) // one if one else 0
    instead = "choose a folder on another disk with --set runs_dir=FOLDER"
    if fitting >= 2:
        instead = f"--keep {fitting - 1} without --keep-every fits; or {instead}"
    raise DstrainError(
        f"the checkpoints need {format_bytes(needed)} at most ({format_bytes(one)} each, including the"
        f" one being written), but only {format_bytes(free + held)} are free for them",
        where=where,
        hint=instead,
    )
