"""Patches that both DeepSpeed engines need: one gradient norm, and one optimizer for mixed precision.

The gradient norm is that of the whole model, with each weight counted once. What DeepSpeed 0.19.8 does instead: ZeRO-0
with stages clips by the first stage's norm alone and reports none; ZeRO-1 and 2 do one collective a parameter group,
which hangs when stages differ in their number of groups. And disks are waited for outside of the training's groups.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.comm import comm
from deepspeed.ops.op_builder.builder import OpBuilder
from deepspeed.runtime.engine import ZERO_OPTIMIZATION, DeepSpeedEngine
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from dstrain.control_group import barrier


class PatchedEngine(DeepSpeedEngine):  # type: ignore[misc]
    """Mixed into both engines, before DeepSpeed's own.

    Attributes:
        step_loss: of the step that is to be taken, a scalar on the device; set before it is.
        step_loss_on_host: the same, once the norm has been read; None where no norm was taken.
    """

    step_loss: torch.Tensor
    step_loss_on_host: float | None = None

    def read_norm(self, norm: torch.Tensor) -> torch.Tensor:
        """A step's gradient norm on the host, and its loss with it.

        The host waits for the device once in a step: here, before the optimizer's part of it. While the device does
        that, the step is recorded and the next one begins.
        """
        both = on_host(torch.stack([value.detach().float().reshape(()) for value in (norm, self.step_loss)]))
        self.step_loss_on_host = float(both[1])
        return both[0]

    def module_state_dict(self, *args: Any, exclude_frozen_parameters: bool = False, **kwargs: Any) -> Any:
        """Without frozen parameters, a tied one is left out under each of its names; upstream keeps all but one."""
        state = super().module_state_dict(
            *args, exclude_frozen_parameters=exclude_frozen_parameters, **kwargs
        )
        if exclude_frozen_parameters and state is not None:
            for name, parameter in self.module.named_parameters(remove_duplicate=False):
                if not parameter.requires_grad:
                    state.pop(name, None)
        return state

    def _do_optimizer_sanity_check(self, basic_optimizer: Any) -> Any:
        """bf16 with ZeRO-1 keeps the optimizer that every other precision and stage has.

        Upstream switches to ``BF16_Optimizer`` there, whose gradient norm, tied gradients and
        checkpoints are made otherwise.
        """
        chosen = super()._do_optimizer_sanity_check(basic_optimizer)
        return ZERO_OPTIMIZATION if self.zero_optimization() else chosen

    def _configure_zero_optimizer(self, optimizer: Any) -> Any:
        zero = super()._configure_zero_optimizer(optimizer)
        if isinstance(zero, DeepSpeedZeroOptimizer):
            zero.scaled_global_norm = lambda norm_type=2: self.read_norm(partitioned_norm(zero, norm_type))
        elif isinstance(zero, DeepSpeedZeroOptimizer_Stage3):
            # In place of one norm for each group: one for all, which is the only one to be combined then.
            zero._get_norm_groups = lambda: [self.read_norm(zero3_norm(zero))]
        return zero

    def _take_model_step(self, lr_kwargs: Any) -> None:
        """ZeRO-0 reports the norm too, clipped or not, and clips by the whole model's."""
        self.step_loss_on_host = None
        if not self.zero_optimization():
            counted = [p.grad for p in self.module.parameters() if p.grad is not None and not is_copy(p)]
            # Without stages each replica holds the whole gradient: there is nothing to add up.
            stages = self.mpu.get_model_parallel_group() if self.mpu is not None else None
            self._norm_on_device = norm_over(counted, stages)
            self._global_grad_norm = self.read_norm(self._norm_on_device)
        super()._take_model_step(lr_kwargs)

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        with _barriers_that_wait_for_disks():
            return super().save_checkpoint(*args, **kwargs)

    def _checkpoint_tag_validation(self, tag: str) -> None:
        """Nothing: all ranks save under one tag. Upstream compares it in two collectives, byte by byte."""

    def _optimizer_has_ckpt_event_epilogue(self) -> bool:
        """Asked when a rank has written or read its last file of a checkpoint. What follows are collectives of the
        training, which would end the run where another rank's disk takes longer."""
        barrier()
        return bool(super()._optimizer_has_ckpt_event_epilogue())

    def clip_fp32_gradients(self) -> None:
        clip_whole(self.module.parameters(), self._norm_on_device, self.gradient_clipping())


@contextmanager
def _barriers_that_wait_for_disks() -> Iterator[None]:
    """Within it, DeepSpeed's barriers of all ranks are `dstrain.control_group`'s. Upstream waits in the default group,
    which on GPUs ends a run whose slowest disk writes for longer than its timeout."""
    backend = comm.cdb
    original = backend.barrier

    def wait(group: Any = None, *args: Any, **kwargs: Any) -> Any:
        return barrier() if group is None else original(group, *args, **kwargs)

    backend.barrier = wait
    try:
        yield
    finally:
        del backend.barrier


def _quoted_libraries(jit_load: Any) -> Any:
    """DeepSpeed's CPU optimizer and its reader of NVMe disks are compiled where they are used. torch quotes the
    include folders for that, and not its own library folder: where the path of the virtual environment holds a
    space, nothing could be linked."""

    @wraps(jit_load)
    def load(self: OpBuilder, verbose: bool = True) -> Any:
        from torch.utils import cpp_extension

        folder = cpp_extension.TORCH_LIB_PATH
        cpp_extension.TORCH_LIB_PATH = shlex.quote(folder)
        try:
            return jit_load(self, verbose)
        finally:
            cpp_extension.TORCH_LIB_PATH = folder

    return load


OpBuilder.jit_load = _quoted_libraries(OpBuilder.jit_load)


def is_copy(parameter: torch.Tensor) -> bool:
    """True for the copies of a tied weight that do not count: all but the first stage's."""
    return bool(getattr(parameter, "ds_pipe_replicated", False))


def norm_over(gradients: Iterable[torch.Tensor], group: Any | None) -> torch.Tensor:
    """L2 norm of tensors that are spread over the ranks of ``group``, as one float32 number.

    Every rank gives the tensors that it alone owns; one all-reduce adds the squares. Without a group
    this rank's tensors are all there is.
    """
    norms = [torch.linalg.vector_norm(gradient.detach().float()) for gradient in gradients]
    total = torch.zeros((), dtype=torch.float64)
    if norms:
        total = torch.stack(norms).double().square().sum()
    total = total.to(device=get_accelerator().current_device_name(), dtype=torch.float32).reshape(1)
    if group is not None:
        dist.all_reduce(total, group=group)
    return total.sqrt()[0]


def whole_norm(owned: Iterable[torch.Tensor]) -> torch.Tensor:
    """L2 norm of what all ranks of the world own together; -1 for inf or nan, as upstream has it.

    Upstream asks the device about it for each parameter group, and once more.
    """
    return torch.nan_to_num(norm_over(owned, dist.get_world_group()), nan=-1.0, posinf=-1.0)


def on_host(value: torch.Tensor) -> torch.Tensor:
    """A number of the device in the host's memory, where it can be asked about at will. The host waits."""
    return value.cpu()


def partitioned_norm(optimizer: DeepSpeedZeroOptimizer, norm_type: int) -> torch.Tensor:
    """For ``DeepSpeedZeroOptimizer.scaled_global_norm``: still scaled by the loss scale.

    Returns a float32 scalar; -1 stands for inf or nan, as upstream has it.
    """
    if norm_type != 2:
        raise ValueError("only the L2 norm is supported")
    owned = []
    for index, parameters in enumerate(optimizer.bit16_groups):
        if all(is_copy(parameter) for parameter in parameters):
            continue
        if any(is_copy(parameter) for parameter in parameters):
            raise ValueError("a tied weight's copy shares its parameter group with other weights")
        if optimizer.cpu_offload:
            owned.append(optimizer.single_partition_of_fp32_groups[index].grad)
        else:
            owned.extend(optimizer.averaged_gradients[index])
    return whole_norm(owned)


def zero3_norm(optimizer: DeepSpeedZeroOptimizer_Stage3) -> torch.Tensor:
    """The same for ZeRO-3: over all stages and partitions, each weight once."""
    owned = []
    for index, parameters in enumerate(optimizer.fp16_groups):
        if optimizer._swappable_optimizer_subgroup(index):
            norms = optimizer.norm_for_param_grads  # they were taken before the gradients went to the disk
            numbers = (optimizer.get_param_id(p) for p in parameters if not is_copy(p))
            owned += [norms[number] for number in numbers if number in norms]
            continue
        if optimizer.offload_optimizer:
            if not all(is_copy(parameter) for parameter in parameters):
                owned.append(optimizer.fp32_partitioned_groups_flat[index].grad)
            continue
        gradients = optimizer.averaged_gradients[index]
        owned += [g for p, g in zip(parameters, gradients, strict=True) if not is_copy(p)]
    return whole_norm(owned)


def clip_whole(parameters: Iterable[torch.nn.Parameter], norm: torch.Tensor, largest: float) -> None:
    """Scale gradients in place so that the norm of the whole is at most ``largest``.

    Source: torch.nn.utils.clip_grad_norm_, with the norm taken over all ranks.
    """
    factor = torch.clamp(largest / (norm + 1e-6), max=1.0)
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(factor.to(parameter.grad.device))
