"""ZeRO-3: shards each layer as soon as it is built, and a pipeline stage's parameters across its replicas.

DeepSpeed would shard when the engine is made, with the whole model in each process by then. Within a pipeline,
DeepSpeed 0.19.8 refuses ZeRO-3. What stands in the way, and what is done about it here:

- the coordinator that prefetches parameters checks its order against rank 0 of the whole world, where
  another stage does other work: the check is made among the replicas of the stage;
- the gradient norm counts a stage's parameters only on the first stage: one norm over all ranks;
- tied weights' gradients stay unreduced: their partitions are summed over the stages that hold a copy.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from deepspeed.runtime.zero import partitioned_param_coordinator
from deepspeed.runtime.zero.partition_parameters import Init, is_zero_param
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import nn

from dstrain.engine.interface import DTYPES
from dstrain.json_collectives import all_gather_json
from dstrain.model.initialise import cast
from dstrain.model.skeleton import return_freed_memory


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
        return_freed_memory()

    return share_out


def _type_of(deepspeed: dict[str, Any]) -> torch.dtype:
    for key in ("bf16", "fp16"):
        if deepspeed.get(key, {}).get("enabled"):
            return DTYPES[key]
    return DTYPES["fp32"]


def check_orders_among(group: Any) -> None:
    """From now on in this process, ZeRO-3's order of parameters is compared among the ranks of ``group``."""
    partitioned_param_coordinator.assert_ints_same_as_other_ranks = _same_among(group)


def _same_among(group: Any) -> Callable[[list[int]], None]:
    def check(numbers: list[int]) -> None:
        everyone = all_gather_json([int(number) for number in numbers], group)
        if any(other != everyone[0] for other in everyone):
            raise RuntimeError(
                f"the replicas of a stage use their parameters in different orders: {everyone}"
            )

    return check


def partition_of_gradient(
    optimizer: DeepSpeedZeroOptimizer_Stage3, weight: torch.nn.Parameter
) -> torch.Tensor:
    """This rank's part of a tied weight's reduced gradient, after the last backward pass of a step.

    The weight is alone in its group.
    """
    for index, parameters in enumerate(optimizer.fp16_groups):
        if any(parameter is weight for parameter in parameters):
            gradient: torch.Tensor
            if optimizer.offload_optimizer:
                gradient = optimizer.fp32_partitioned_groups_flat[index].grad
            else:
                [gradient] = optimizer.averaged_gradients[index]
            return gradient
    raise ValueError("the weight belongs to no parameter group")
