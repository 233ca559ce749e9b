"""ZeRO-3 initialisation: shards each layer across the replicas as soon as it is built.

DeepSpeed would do so when the engine is made, with the whole model in each process by then.
"""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Callable
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import Init, is_zero_param
from torch import nn

from dstrain.engine.precision import DTYPES
from dstrain.model.initialise import cast


def zero3_init(deepspeed: dict[str, Any], mpu: Any = None) -> Callable[[nn.Module], None]:
    """What to do with a module whose parameters have just got their values: at ZeRO-3 a collective, else nothing.

    Args:
        deepspeed: the whole DeepSpeed JSON.
        mpu: knows the replicas of this stage; None: all processes are replicas.
    """
    if deepspeed["zero_optimization"]["stage"] != 3:
        return lambda module: None
    group = mpu.get_data_parallel_group() if mpu is not None else None

    def share_out(module: nn.Module) -> None:
        if all(is_zero_param(parameter) for parameter in module.parameters()):
            return
        cast(module, _type_of(deepspeed))  # the engine casts only what is not sharded yet
        document = copy.deepcopy(deepspeed)
        Init(module=module, data_parallel_group=group, config_dict_or_path=document, mpu=mpu)
        _give_back_freed_memory()

    return share_out


def _give_back_freed_memory() -> None:
    """Whole layers were freed between shares that stay: without this, most of their pages would stay too.

    Source: malloc_trim(3), of the GNU C library; others manage without.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _type_of(deepspeed: dict[str, Any]) -> torch.dtype:
    for key in ("bf16", "fp16"):
        if deepspeed.get(key, {}).get("enabled"):
            return DTYPES[key]
    return DTYPES["fp32"]
