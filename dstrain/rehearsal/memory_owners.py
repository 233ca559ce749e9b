"""What holds a rank's parameters, gradients and optimizer states in DeepSpeed's engines, for the count of memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from deepspeed.runtime.pipe import schedule

from dstrain.model.quantization import quantized_parts
from dstrain.rehearsal.memory_count import MemoryCount


def watch_gradients(engine: Any, counter: MemoryCount) -> None:
    """Note what holds gradients behind each backward pass, before they are reduced, and before the optimizer works."""

    def noting(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            note_gradients(engine, counter)
            result = original(*args, **kwargs)
            note_gradients(engine, counter)
            return result

        return call

    engine.backward = noting(engine.backward)
    if not engine.zero_optimization_partition_gradients():  # else they are on their way to their shares then
        engine.allreduce_gradients = noting(engine.allreduce_gradients)
    engine._take_model_step = noting(engine._take_model_step)
    if hasattr(engine, "_INSTRUCTION_MAP"):
        passes = (kind for kind in engine._INSTRUCTION_MAP if issubclass(kind, schedule.BackwardPass))
        of_interest = (*passes, schedule.ReduceGrads)
        noted = {kind: noting(engine._INSTRUCTION_MAP[kind]) for kind in of_interest}
        engine._INSTRUCTION_MAP = {**engine._INSTRUCTION_MAP, **noted}


def note_gradients(engine: Any, counter: MemoryCount) -> None:
    """What holds gradients now; not the buckets that they are copied into on their way."""
    for bucket in getattr(engine.optimizer, "ipg_buckets", {}).values():
        buffer = bucket.buffer
        counter.own("buffers", [buffer] if isinstance(buffer, torch.Tensor) else buffer or ())
    counter.own("gradients", held_gradients(engine))


def held_parameters(engine: Any) -> Iterator[torch.Tensor]:
    yield from engine.module.buffers()
    for parameter in engine.module.parameters():
        yield parameter.data
        yield from quantized_parts(parameter)
        if hasattr(parameter, "ds_tensor"):
            yield parameter.ds_tensor.data


def optimizer_states(engine: Any) -> Iterator[torch.Tensor]:
    optimizer = engine.optimizer
    for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
        yield from (partition.data for partition in getattr(optimizer, name, ()))
    for state in inner_optimizer(engine).state.values():
        yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def inner_optimizer(engine: Any) -> Any:
    """The optimizer that keeps the states: DeepSpeed's own for ZeRO is around it."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def held_gradients(engine: Any) -> Iterator[torch.Tensor]:
    for parameter in engine.module.parameters():
        for name in ("grad", "grad_accum"):
            gradient = getattr(parameter, name, None)
            if gradient is not None:
                yield gradient
    optimizer = engine.optimizer
    for name in ("averaged_gradients", "all_grad_tensors", "accumulated_grads_in_cpu"):
        for held in (getattr(optimizer, name, None) or {}).values():
            yield from [held] if isinstance(held, torch.Tensor) else held or ()
    for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
        yield from (p.grad for p in getattr(optimizer, name, ()) if p.grad is not None)
    flat = getattr(optimizer, "grad_partitions_flat_buffer", None)
    if flat is not None:
        yield flat
