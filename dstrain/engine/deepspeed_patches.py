"""Patches that both DeepSpeed engines need: one gradient norm, and one optimizer for mixed precision."""

from __future__ import annotations

import shlex
from functools import wraps
from types import MethodType
from typing import Any

from deepspeed.ops.op_builder.builder import OpBuilder
from deepspeed.runtime.engine import ZERO_OPTIMIZATION, DeepSpeedEngine
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from dstrain.engine.gradient_norm import clip_whole, is_copy, norm_over, partitioned_norm


class PatchedEngine(DeepSpeedEngine):  # type: ignore[misc]
    """Mixed into both engines, before DeepSpeed's own."""

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
            zero.scaled_global_norm = MethodType(partitioned_norm, zero)
        return zero

    def _take_model_step(self, lr_kwargs: Any) -> None:
        """ZeRO-0 reports the norm too, clipped or not, and clips by the whole model's."""
        if not self.zero_optimization():
            counted = [p.grad for p in self.module.parameters() if p.grad is not None and not is_copy(p)]
            # Without stages each replica holds the whole gradient: there is nothing to add up.
            stages = self.mpu.get_model_parallel_group() if self.mpu is not None else None
            self._global_grad_norm = norm_over(counted, stages)
        super()._take_model_step(lr_kwargs)

    def clip_fp32_gradients(self) -> None:
        clip_whole(self.module.parameters(), self._global_grad_norm, self.gradient_clipping())


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
