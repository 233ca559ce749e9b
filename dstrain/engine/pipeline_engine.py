"""DeepSpeed's pipeline engine for every ZeRO stage, with tied weights that stay equal.

`StagedEngine` carries out any table of `dstrain.planning.schedules`; `DualPipeVStagedEngine` is DeepSpeed's own.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from deepspeed import comm as dist
from deepspeed.runtime.pipe import dualpipev, schedule
from deepspeed.runtime.pipe import engine as pipe_engine
from torch.autograd.graph import GradientEdge, get_gradient_edge

from dstrain.engine.deepspeed_patches import PatchedEngine
from dstrain.engine.interface import MicroBatch
from dstrain.engine.pipeline_messages import Key, Mailbox
from dstrain.engine.pipeline_module import recompute
from dstrain.engine.weight_gradients import PutOffGradients, install, putting_off
from dstrain.engine.zero3 import check_orders_among, partition_of_gradient
from dstrain.model.layers import BlockLayer
from dstrain.planning.schedules.named import forward_only, one_forward_one_backward, zero_bubble_h1
from dstrain.planning.schedules.table import (
    BACKWARD,
    FORWARD,
    INPUTS,
    WEIGHTS,
    Action,
    Table,
    in_a_row,
)


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
    """What all schedules need, before DeepSpeed's own pipeline engine in the order of classes.

    Attributes:
        batch: the micro-batches of the step or evaluation to come, the same on all stages.
    """

    # Attributes of DeepSpeed's engines, which have no types.
    grad_layer: Any
    micro_batches: int
    num_stages: int
    total_loss: torch.Tensor | None
    batch: Sequence[MicroBatch] = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with _zero_stages_admitted():
            super().__init__(*args, **kwargs)
        if self.zero_optimization_partition_weights():
            check_orders_among(self.grid.get_data_parallel_group())
        self.module.activation_checkpoint_func = recompute
        self._partitions_gradients = self.zero_optimization_partition_gradients()
        # ZeRO-2 reduces in the backward pass, not at the schedule's ReduceGrads.
        self.enable_backward_allreduce = self._partitions_gradients
        self._backward_passes = 0

    fewest_micro_batches = 1  # of a batch

    def _backward_passes_of_a_step(self) -> int:
        """Of this rank; those that are run in two parts count twice."""
        raise NotImplementedError

    def train_batch(self, data_iter: Any = None) -> torch.Tensor:
        self._backward_passes = 0
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
        return super().eval_batch(*args, **kwargs)

    def _exec_forward_pass(self, buffer_id: int, **kwargs: Any) -> None:
        """The head computes the loss inside its forward, where ZeRO-3 has gathered its weights."""
        micro_batch = self._micro_batch(buffer_id, **kwargs)
        self.module.documents = micro_batch.documents
        asked: Any = nullcontext()
        if self._compute_loss and self._starts_at_loss(**kwargs):
            asked = self.module.head.asked(target=(micro_batch.labels, micro_batch.weight))
        with asked:
            self._run_forward(buffer_id, **kwargs)

    def _exec_backward_pass(self, buffer_id: int, **kwargs: Any) -> None:
        self._backward_passes += 1
        self._force_grad_boundary = self._backward_passes == self._backward_passes_of_a_step()
        if self.zero_optimization_partition_weights():
            # The first backward pass of a step overwrites gradients, the later ones add. Upstream counts
            # at each forward pass, of which there may be none between two backward passes.
            self.optimizer.micro_step_id = self._backward_passes - 1
        self._run_backward(buffer_id, **kwargs)
        if self._partitions_gradients and not self._starts_at_loss(**kwargs):
            self._backward_epilogue()  # where it starts at the loss, engine.backward() has called it
        self._force_grad_boundary = False

    def _micro_batch(self, buffer_id: int, **kwargs: Any) -> MicroBatch:
        return self.batch[buffer_id]

    def _run_forward(self, buffer_id: int, **kwargs: Any) -> None:
        raise NotImplementedError

    def _run_backward(self, buffer_id: int, **kwargs: Any) -> None:
        raise NotImplementedError

    def _starts_at_loss(self, **kwargs: Any) -> bool:
        """Whether a backward pass of this stage starts at the loss rather than at a received gradient."""
        raise NotImplementedError

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


_MENDED = {
    schedule.ForwardPass: _StagedMends._exec_forward_pass,
    schedule.BackwardPass: _StagedMends._exec_backward_pass,
    schedule.ReduceGrads: _StagedMends._exec_reduce_grads,
    schedule.ReduceTiedGrads: _StagedMends._exec_reduce_tied_grads,
    schedule.OptimizerStep: _StagedMends._exec_optimizer_step,
}


class InputGradients(schedule.BackwardPass):  # type: ignore[misc]
    """The first part of a backward pass."""


class WeightGradients(schedule.BackwardPass):  # type: ignore[misc]
    """The second one."""


class _TableSchedule(schedule.PipeSchedule):  # type: ignore[misc]
    """A rank's part of a table in DeepSpeed's instructions, and the optimizer's step behind it in training."""

    def __init__(self, table: Table, rank: int, *, trains: bool) -> None:
        super().__init__(table.micro_batches, len(table.ranks), rank)
        self.table = table
        self.trains = trains

    def num_pipe_buffers(self) -> int:
        return 0  # DeepSpeed's own are not used

    def steps(self) -> Iterator[list[Any]]:
        passes = {
            FORWARD: schedule.ForwardPass,
            BACKWARD: schedule.BackwardPass,
            INPUTS: InputGradients,
            WEIGHTS: WeightGradients,
        }
        for kind, chunk, micro_batch in self.table.ranks[self.stage_id]:
            yield [passes[kind](micro_batch, chunk=chunk)]
        if self.trains:
            yield [schedule.ReduceTiedGrads(), schedule.ReduceGrads(), schedule.OptimizerStep()]


class _Arrival(torch.autograd.Function):
    """What a stage has received, as its first layer may change it in place: a tensor that is no leaf, in its memory."""

    @staticmethod
    def forward(ctx: Any, *received: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.mark_non_differentiable(*(tensor for tensor in received if not tensor.is_floating_point()))
        return tuple(tensor.detach() for tensor in received)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return gradients


_arrive: Callable[..., tuple[torch.Tensor, ...]] = _Arrival.apply


@dataclass
class _Pass:
    """A micro-batch on its way through a chunk, from its forward pass to its backward pass.

    Attributes:
        received: from the chunk before; the backward pass leaves their gradients there.
        sent: where the gradients of what was handed on come in. The tensors themselves may be gone.
        loss: of the last chunk.
        weights: where a backward pass in two parts leaves the gradients of the weights; None: it is run at once.
    """

    received: list[torch.Tensor]
    weights: PutOffGradients | None
    sent: list[GradientEdge] = field(default_factory=list)
    loss: torch.Tensor | None = None


class StagedEngine(_StagedMends, pipe_engine.PipelineEngine):  # type: ignore[misc]
    """``PipelineEngine`` with these changes, each shown by a test that fails without it:

    - It carries out any table of `dstrain.planning.schedules`. What upstream sends and receives in step with
      computing, goes on beside it here (`dstrain.engine.pipeline_messages`), and in no more memory than it needs:
      what a stage has sent is gone when it has arrived. Positions, which all stages know, are not sent.
    - ZeRO-2: gradients are reduced behind each micro-batch's backward pass, on every stage, and the
      last one is the accumulation boundary (upstream refuses ZeRO-2, and would reduce on the last
      stage only).
    - Tied weights: their gradients are first reduced over the replicas, then summed over the stages
      that hold a copy. In this order all copies get the same bits, so they never drift apart.
      (Upstream sums ``weight.grad``, which is empty when gradients are accumulated in another dtype
      or partitioned.)
    """

    make_table: Callable[[int, int], Table] = staticmethod(one_forward_one_backward)
    """The table for so many ranks and micro-batches."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._tables: dict[int, Table] = {}
        self._trains = False
        # Not the head's: what its weight's gradient is made of is as wide as the vocabulary, and would wait as well.
        blocks = (layer for layer in self.module.children() if isinstance(layer, BlockLayer))
        self._of_blocks = frozenset(parameter for block in blocks for parameter in block.parameters())
        self._in_flight: dict[tuple[int, int], _Pass] = {}
        self._mailbox = Mailbox(
            self.stage_id, self.grid.stage_to_global, self.device, *self._groups_of_directions()
        )

    def _groups_of_directions(self) -> list[Any]:
        """For messages to higher ranks and to lower ones: NCCL wants a group for each."""
        if self.device.type == "cpu":
            return [None, None]
        mine: list[Any] = []
        for _ in range(2):
            for replica in range(self.grid.data_parallel_size):
                ranks = [self.grid.stage_to_global(stage, data=replica) for stage in range(self.num_stages)]
                group = dist.new_group(ranks)
                if self.global_rank in ranks:
                    mine.append(group)
        return mine

    @property
    def table(self) -> Table:
        """Of the step or evaluation that runs."""
        return self._mailbox.table

    def _train_schedule(self) -> _TableSchedule:
        count = self.micro_batches
        if count not in self._tables:
            table = self._tables[count] = self.make_table(self.num_stages, count)
            if table.splits_backward:
                install()
        return _TableSchedule(self._tables[count], self.stage_id, trains=True)

    def _backward_passes_of_a_step(self) -> int:
        return sum(action.kind != FORWARD for action in self.table.ranks[self.stage_id])

    def _inference_schedule(self, micro_batches: int) -> _TableSchedule:
        table = forward_only(in_a_row(self.num_stages), micro_batches)
        return _TableSchedule(table, self.stage_id, trains=False)

    def _exec_schedule(self, pipe_schedule: _TableSchedule) -> None:
        self._in_flight.clear()
        self._trains = pipe_schedule.trains
        self._mailbox.begin(pipe_schedule.table, self._key)
        super()._exec_schedule(pipe_schedule)
        self._mailbox.end()

    def _key(self, micro_batch: int) -> Key:
        # Not whether gradients are enabled now: in a hook of a backward pass they are not.
        return self._trains, *self.batch[micro_batch].input_ids.shape

    def _run_forward(self, buffer_id: int, chunk: int) -> None:  # type: ignore[override]
        action = Action(FORWARD, chunk, buffer_id)
        micro_batch = self.batch[buffer_id]
        before = self.table.waits_for(action)
        received = [] if before is None else self._receive(before)
        inputs: tuple[torch.Tensor, ...] = (micro_batch.input_ids, micro_batch.position_ids)
        if received:
            hidden, *sums = _arrive(*received)
            inputs = (hidden, micro_batch.position_ids, *sums)
        splits = torch.is_grad_enabled() and self.table.splits_backward
        weights = PutOffGradients(self._of_blocks) if splits else None
        step = self._in_flight[chunk, buffer_id] = _Pass(received, weights)
        self.tput_timer.start()
        with putting_off(step.weights):
            outputs = super(pipe_engine.PipelineEngine, self).forward(inputs)
        if self._starts_at_loss(chunk):
            self._keep_result(outputs, step)
        else:
            hidden, _, *sums = outputs
            self._mailbox.send(action, (hidden, *sums))
            step.sent = [get_gradient_edge(each) for each in (hidden, *sums) if each.requires_grad]
        if not torch.is_grad_enabled():
            del self._in_flight[chunk, buffer_id]

    def _receive(self, action: Action) -> list[torch.Tensor]:
        specs = self._mailbox.specs(action)
        received = self._mailbox.take(action)
        for tensor, spec in zip(received, specs, strict=True):
            tensor.requires_grad_(spec.trained)
        return received

    def _keep_result(self, outputs: torch.Tensor, step: _Pass) -> None:
        """The last stage's: a loss, or the logits that an evaluation asks for."""
        self.fwd_outputs.append(outputs.detach())
        if self.eval_return_logits:
            self.outputs = outputs
        if torch.is_grad_enabled():
            step.loss = outputs
            self.total_loss = (
                outputs.detach() if self.total_loss is None else self.total_loss + outputs.detach()
            )

    def _exec_input_gradients(self, buffer_id: int, chunk: int) -> None:
        self._exec_backward_pass(buffer_id, chunk=chunk)

    def _exec_weight_gradients(self, buffer_id: int, chunk: int) -> None:
        self._exec_backward_pass(buffer_id, chunk=chunk, weights=True)

    def _run_backward(self, buffer_id: int, chunk: int, weights: bool = False) -> None:  # type: ignore[override]
        step = self._in_flight[chunk, buffer_id]
        if weights:
            assert step.weights is not None
            with self._in_backward():
                step.weights.compute()
        else:
            self._run_backward_from_outputs(Action(BACKWARD, chunk, buffer_id), step)
        if weights or step.weights is None:
            del self._in_flight[chunk, buffer_id]

    def _run_backward_from_outputs(self, action: Action, step: _Pass) -> None:
        """All of a backward pass, or the gradients of the inputs with those that are not put off."""
        if step.weights is not None:
            action = action._replace(kind=INPUTS)
        sends = self.table.message_of(action) is not None
        trained = [tensor for tensor in step.received if tensor.requires_grad]
        if sends and len(trained) == 1:  # as soon as it is there, before other gradients are reduced
            # What the hook holds must not hold the tensor, which would live on until Python looks for cycles.
            trained[0].register_post_accumulate_grad_hook(
                lambda tensor: self._send_gradients(action, [tensor])
            )
        with putting_off(step.weights):  # for what is computed again
            if step.loss is not None:
                super(pipe_engine.PipelineEngine, self).backward(step.loss)
            elif step.sent:
                after = self.table.waits_for(action)
                assert after is not None
                gradients = self._mailbox.take(after)
                with self._in_backward():
                    torch.autograd.backward(step.sent, gradients)
        if sends and (len(trained) != 1 or trained[0].grad is None):
            self._send_gradients(action, trained)
        step.loss, step.sent, step.received = None, [], []

    def _send_gradients(self, action: Action, received: list[torch.Tensor]) -> None:
        """Of what a backward pass has received, zeros where nothing has come of it."""
        gradients = [torch.zeros_like(one) if one.grad is None else one.grad for one in received]
        self._mailbox.send(action, gradients)

    @contextmanager
    def _in_backward(self) -> Iterator[None]:
        """As engine.backward() says it to DeepSpeed's hooks."""
        self._running_engine_backward = True
        try:
            yield
        finally:
            self._running_engine_backward = False

    def _starts_at_loss(self, chunk: int, weights: bool = False) -> bool:  # type: ignore[override]
        return chunk == len(self.table.placement) - 1 and not weights

    _INSTRUCTION_MAP: ClassVar = {
        **pipe_engine.PipelineEngine._INSTRUCTION_MAP,
        **_MENDED,
        InputGradients: _exec_input_gradients,
        WeightGradients: _exec_weight_gradients,
    }


class ZeroBubbleEngine(StagedEngine):
    """With the schedule ZB-H1: the gradients of the weights are put off."""

    make_table = staticmethod(zero_bubble_h1)


class DualPipeVStagedEngine(_StagedMends, dualpipev.DualPipeVEngine):  # type: ignore[misc]
    """``DualPipeVEngine`` with the same changes for ZeRO and tied weights: each rank holds two stages and runs both
    backwards."""

    def _backward_passes_of_a_step(self) -> int:
        return 2 * self.micro_batches

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._receive_buffers: dict[tuple[int, torch.dtype], torch.Tensor] = {}
        self._forward_passes: Counter[int] = Counter()
        super().__init__(*args, **kwargs)

    @property
    def fewest_micro_batches(self) -> int:  # type: ignore[override]
        return 2 * self.num_stages

    def _exec_schedule(self, pipe_schedule: Any) -> None:
        self._forward_passes.clear()
        super()._exec_schedule(pipe_schedule)

    def _micro_batch(self, buffer_id: int, phase: int) -> MicroBatch:  # type: ignore[override]
        """Forward passes run in the order of the micro-batches, in each phase."""
        number = self._forward_passes[phase]
        self._forward_passes[phase] += 1
        return self.batch[number]

    def _run_forward(self, buffer_id: int, phase: int) -> None:  # type: ignore[override]
        dualpipev.DualPipeVEngine._exec_forward_pass(self, buffer_id, phase)

    def _run_backward(self, buffer_id: int, phase: int) -> None:  # type: ignore[override]
        with self._one_output(buffer_id, phase):
            dualpipev.DualPipeVEngine._exec_backward_pass(self, buffer_id, phase)

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
    def _one_output(self, buffer_id: int, phase: int) -> Iterator[None]:
        """Let a backward pass that starts at several received gradients run once.

        Upstream calls ``backward`` for each tensor that was sent: twice the work, and twice the reductions of
        gradients behind it.
        """
        outputs = self.pipe_buffers["outputs"][buffer_id]
        if self._starts_at_loss(phase) or sum(t.is_floating_point() for t in outputs) < 2:
            yield
            return
        floats = [tensor for tensor in outputs if tensor.is_floating_point()]
        gradients = self._take_gradients(buffer_id, phase)
        self.pipe_buffers["outputs"][buffer_id] = _together(gradients[1:], *floats)
        try:
            yield
        finally:
            self._give_back_gradients(gradients)

    def eval_batch(self, data_iter: Any, *args: Any, num_micro_batches: int, **kwargs: Any) -> Any:
        # Upstream finds the second stage's buffers by the training's number of micro-batches.
        training, self.micro_batches = self.micro_batches, num_micro_batches
        try:
            return super().eval_batch(data_iter, *args, num_micro_batches=num_micro_batches, **kwargs)
        finally:
            self.micro_batches = training

    def _starts_at_loss(self, phase: int) -> bool:  # type: ignore[override]
        return bool(self._is_loss_stage(phase))

    def _take_gradients(self, buffer_id: int, phase: int) -> list[torch.Tensor]:
        """The received gradients of all outputs; the first of them is left for the backward pass."""
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
