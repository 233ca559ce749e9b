"""DeepSpeed's pipeline engine for every ZeRO stage, with tied weights that stay equal."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from deepspeed import comm as dist
from deepspeed.runtime.pipe import dualpipev, schedule
from deepspeed.runtime.pipe import engine as pipe_engine

from dstrain.engine.deepspeed_patches import PatchedEngine
from dstrain.engine.pipeline_module import recompute
from dstrain.engine.zero3 import check_orders_among, partition_of_gradient
from dstrain.model.document_lengths import DocumentLengths


@contextmanager
def _zero_stages_admitted() -> Iterator[None]:
    """Lift ``assert stage < ZeroStageEnum.gradients`` in ``PipelineEngine.__init__``.

    The enumeration is used nowhere else in that file.
    """
    original = pipe_engine.ZeroStageEnum
    pipe_engine.ZeroStageEnum = SimpleNamespace(gradients=original.weights + 1)
    try:
        yield
    finally:
        pipe_engine.ZeroStageEnum = original


class _StagedMends(PatchedEngine):
    """What both schedules need, before DeepSpeed's own pipeline engine in the order of classes."""

    # Attributes of DeepSpeed's engines, which have no types.
    grad_layer: Any
    micro_batches: int
    num_stages: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._receive_buffers: dict[tuple[int, torch.dtype], torch.Tensor] = {}
        self.documents: Sequence[DocumentLengths | None] = []
        self._forward_passes: Counter[int] = Counter()
        with _zero_stages_admitted():
            super().__init__(*args, **kwargs)
        if self.zero_optimization_partition_weights():
            check_orders_among(self.grid.get_data_parallel_group())
        self.module.activation_checkpoint_func = recompute
        self._partitions_gradients = self.zero_optimization_partition_gradients()
        # ZeRO-2 reduces in the backward pass, not at the schedule's ReduceGrads.
        self.enable_backward_allreduce = self._partitions_gradients
        self._backward_passes = 0

    # How many backward passes a rank runs for one micro-batch, and the fewest micro-batches of a batch.
    passes_per_micro_batch = 1
    fewest_micro_batches = 1

    def train_batch(self, data_iter: Any = None) -> torch.Tensor:
        self._backward_passes = 0
        self._forward_passes.clear()
        loss: torch.Tensor = super().train_batch(data_iter)
        return loss

    def _exec_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The loss comes first: it is read together with the gradient norm."""
        self.step_loss = self._mean_loss()
        super()._exec_optimizer_step(*args, **kwargs)

    def _aggregate_total_loss(self) -> torch.Tensor:
        return self.step_loss

    def _mean_loss(self) -> torch.Tensor:
        """Over micro-batches and replicas, on all stages. Upstream's waits for the device where it is no last stage."""
        source = self._loss_stage_global_rank()
        if self.global_rank == source:
            loss: torch.Tensor = self._scale_loss_by_gas(self.total_loss).detach().float().reshape(1)
            if self.is_data_parallel:
                dist.all_reduce(loss, group=self.mpu.get_data_parallel_group())
                loss /= self.dp_world_size
        else:
            loss = torch.zeros(1, device=self.device)
        if self.is_pipe_parallel:
            dist.broadcast(loss, src=source, group=self.mpu.get_pipe_parallel_group())
        return loss[0]

    def eval_batch(self, *args: Any, **kwargs: Any) -> Any:
        # Upstream adds an evaluation's outputs to the total of the last training batch.
        self.total_loss = None
        self._forward_passes.clear()
        return super().eval_batch(*args, **kwargs)

    def _exec_forward_pass(self, buffer_id: int, **kwargs: Any) -> None:
        """The head computes the loss inside its forward, where ZeRO-3 has gathered its weights.

        The documents of a micro-batch are known on every stage, and in the order in which it runs forward passes.
        """
        chunk = kwargs.get("phase", 0)
        number = self._forward_passes[chunk]
        self._forward_passes[chunk] += 1
        self.module.documents = self.documents[number] if number < len(self.documents) else None
        if not (self._compute_loss and self._starts_at_loss(**kwargs)):
            super()._exec_forward_pass(buffer_id, **kwargs)
            return
        with self.module.head.asked(target=self.pipe_buffers["labels"][buffer_id]):
            super()._exec_forward_pass(buffer_id, **kwargs)

    def _exec_backward_pass(self, buffer_id: int, **kwargs: Any) -> None:
        self._backward_passes += 1
        last = self.micro_batches * self.passes_per_micro_batch
        self._force_grad_boundary = self._backward_passes == last
        if self.zero_optimization_partition_weights():
            # The first backward pass of a step overwrites gradients, the later ones add. Upstream counts
            # at each forward pass, of which there may be none between two backward passes.
            self.optimizer.micro_step_id = self._backward_passes - 1
        with self._one_output(buffer_id, **kwargs):
            super()._exec_backward_pass(buffer_id, **kwargs)
        if self._partitions_gradients and not self._starts_at_loss(**kwargs):
            self._backward_epilogue()  # where it starts at the loss, engine.backward() has called it
        self._force_grad_boundary = False

    def _allocate_or_extend_buffers(self, idx: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A buffer to receive into, for each place and type; upstream takes no heed of the type.

        With two tensors that have gradients, a stage's gradient number 1 is a float, and its input number 1 are the
        int64 positions: upstream would receive the one into the other's buffer.
        """
        size = math.prod(shape)
        found = self._receive_buffers.get((idx, dtype))
        if found is None or found.numel() < size:
            found = self._receive_buffers[idx, dtype] = self._allocate_buffer(
                shape, num_buffers=1, dtype=dtype
            )[0]
        return found.flatten()[:size].view(shape)

    @contextmanager
    def _one_output(self, buffer_id: int, **kwargs: Any) -> Iterator[None]:
        """Let a backward pass that starts at several received gradients run once.

        Upstream calls ``backward`` for each tensor that was sent: twice the work, and twice the reductions of
        gradients behind it.
        """
        outputs = self.pipe_buffers["outputs"][buffer_id]
        if self._starts_at_loss(**kwargs) or sum(t.is_floating_point() for t in outputs) < 2:
            yield
            return
        floats = [tensor for tensor in outputs if tensor.is_floating_point()]
        gradients = self._take_gradients(buffer_id, **kwargs)
        self.pipe_buffers["outputs"][buffer_id] = _together(gradients[1:], *floats)
        try:
            yield
        finally:
            self._give_back_gradients(gradients)

    def _take_gradients(self, buffer_id: int) -> list[torch.Tensor]:
        """The received gradients of all outputs; the first of them is left for the backward pass."""
        gradients: list[torch.Tensor] = self.grad_layer
        self.grad_layer = gradients[0]
        return gradients

    def _give_back_gradients(self, gradients: list[torch.Tensor]) -> None:
        """They are receive buffers, which are used again."""
        self.grad_layer = gradients

    def _starts_at_loss(self) -> bool:
        """Whether a backward pass of this stage starts at the loss rather than at a received gradient."""
        return bool(self.is_last_stage())

    def _reentrant_activation_checkpointing(self) -> bool:
        return False

    def _exec_reduce_tied_grads(self) -> None:
        """Nothing yet: tied gradients are summed once they are reduced over the replicas."""

    def _exec_reduce_grads(self) -> None:
        if not self._partitions_gradients:
            super()._exec_reduce_grads()
        for weight, group in self.module.get_tied_weights_and_groups():
            if not weight.requires_grad:
                continue
            for gradient in self._reduced_gradients(weight):
                # Offloaded gradients lie in host memory, where NCCL does not reach.
                here = gradient.to(self.device)
                dist.all_reduce(here, group=group)
                if here is not gradient:
                    gradient.copy_(here)

    def _reduced_gradients(self, weight: torch.nn.Parameter) -> list[torch.Tensor]:
        """What this rank holds of a tied weight's gradient after the reduction over the replicas.

        The weight has a parameter group of its own, so that its partition is cut at the same places
        on every stage that holds a copy.
        """
        if not self.zero_optimization():
            assert weight.grad is not None
            return [weight.grad]
        if self.zero_optimization_partition_weights():
            return [partition_of_gradient(self.optimizer, weight)]
        index = self.optimizer._get_param_group_idx(weight)
        if self.optimizer.cpu_offload:
            return [self.optimizer.single_partition_of_fp32_groups[index].grad]
        return [
            piece
            for piece in self.optimizer.averaged_gradients[index]
            if not getattr(piece, "_zero_padding", False)
        ]


class _Together(torch.autograd.Function):
    """The first of several tensors; its gradient goes backward together with those given for the others."""

    @staticmethod
    def forward(
        ctx: Any, other_gradients: list[torch.Tensor], first: torch.Tensor, *others: torch.Tensor
    ) -> Any:
        ctx.other_gradients = other_gradients
        return first.view_as(first)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return None, gradient, *ctx.other_gradients


_together: Callable[..., torch.Tensor] = _Together.apply

_MENDED = {
    schedule.ForwardPass: _StagedMends._exec_forward_pass,
    schedule.BackwardPass: _StagedMends._exec_backward_pass,
    schedule.ReduceGrads: _StagedMends._exec_reduce_grads,
    schedule.ReduceTiedGrads: _StagedMends._exec_reduce_tied_grads,
    schedule.OptimizerStep: _StagedMends._exec_optimizer_step,
}


class StagedEngine(_StagedMends, pipe_engine.PipelineEngine):  # type: ignore[misc]
    """``PipelineEngine`` (schedule 1F1B) with these changes, each shown by a test that fails without it:

    - ZeRO-2: gradients are reduced behind each micro-batch's backward pass, on every stage, and the
      last one is the accumulation boundary (upstream refuses ZeRO-2, and would reduce on the last
      stage only).
    - Tied weights: their gradients are first reduced over the replicas, then summed over the stages
      that hold a copy. In this order all copies get the same bits, so they never drift apart.
      (Upstream sums ``weight.grad``, which is empty when gradients are accumulated in another dtype
      or partitioned.)
    """

    _INSTRUCTION_MAP: ClassVar = {
        **pipe_engine.PipelineEngine._INSTRUCTION_MAP,
        **_MENDED,
    }


class DualPipeVStagedEngine(_StagedMends, dualpipev.DualPipeVEngine):  # type: ignore[misc]
    """``DualPipeVEngine`` with the same changes: each rank holds two stages and runs both backwards."""

    passes_per_micro_batch = 2

    @property
    def fewest_micro_batches(self) -> int:  # type: ignore[override]
        return 2 * self.num_stages

    def eval_batch(self, data_iter: Any, *args: Any, num_micro_batches: int, **kwargs: Any) -> Any:
        # Upstream finds the second stage's buffers by the training's number of micro-batches.
        training, self.micro_batches = self.micro_batches, num_micro_batches
        try:
            return super().eval_batch(data_iter, *args, num_micro_batches=num_micro_batches, **kwargs)
        finally:
            self.micro_batches = training

    def _starts_at_loss(self, phase: int) -> bool:  # type: ignore[override]
        return bool(self._is_loss_stage(phase))

    def _take_gradients(self, buffer_id: int, phase: int) -> list[torch.Tensor]:  # type: ignore[override]
        if self._is_last_rank() and phase == 0:  # the rank's second stage has left them at its inputs
            turned = self._phase1_buffer(buffer_id)
            inputs = self.pipe_buffers["inputs"][turned]
            self.pipe_buffers["inputs"][turned] = inputs[0]
            return [tensor.grad for tensor in inputs if tensor.is_floating_point()]
        gradients: list[torch.Tensor] = self.pipe_buffers["grads"][buffer_id]
        self.pipe_buffers["grads"][buffer_id] = gradients[0]
        return gradients

    def _give_back_gradients(self, gradients: list[torch.Tensor]) -> None:
        """They were made for this backward pass alone."""

    _INSTRUCTION_MAP: ClassVar = {
        **dualpipev.DualPipeVEngine._INSTRUCTION_MAP,
        **_MENDED,
    }
