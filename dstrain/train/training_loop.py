"""The steps of a training: each is taken, recorded and told of, and validated, checked and saved where that is due."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TextIO

import torch

from dstrain.control_group import all_reduce_max
from dstrain.engine.interface import Engine, MicroBatch, StepResult
from dstrain.engine.traffic_count import TrafficCount
from dstrain.errors import DstrainError
from dstrain.planning.plan import Plan
from dstrain.train.checkpointing.checkpoints import SaveSchedule
from dstrain.train.control_client import ControlClient
from dstrain.train.device import used_memory
from dstrain.train.graceful_shutdown import GracefulShutdown
from dstrain.train.hooks import Hooks
from dstrain.train.lr_schedule import LearningRate
from dstrain.train.metrics import MetricsFile
from dstrain.train.validation import Validation


class Saves(Protocol):
    """What the loop needs of `dstrain.train.checkpointing.checkpoints.Checkpoints`."""

    def raise_if_failed(self) -> None: ...

    def save(self, engine: Engine, step: int, streams: Sequence[Any] | None = None) -> Path: ...

    def take_completed(self) -> list[tuple[int, Path]]: ...


@dataclass
class TrainingLoop:
    """One rank's steps.

    Attributes:
        traffic: made before the ranks met.
        metrics: of rank 0.
        console: where rank 0 says a line a step, if it does.
        losses: those of the last validation, by their names in metrics.
    """

    plan: Plan
    engine: Engine
    device: torch.device
    rank: int
    lr_of: LearningRate
    traffic: TrafficCount
    validation: Validation
    checkpoints: Saves
    leaving: GracefulShutdown
    control: ControlClient
    hooks: Hooks
    metrics: MetricsFile | None
    console: TextIO | None
    losses: Mapping[str, float]
    schedule: SaveSchedule = field(init=False)

    def __post_init__(self) -> None:
        self.config = self.plan.run_config
        self.schedule = SaveSchedule(self.config)

    def validate_before_training(self) -> None:
        """Take the validation losses of step 0. Collective."""
        self.losses = self.validation.losses()
        if self.metrics:
            self.metrics.write({"step": 0, **self.losses, "tokens": 0})
        self.hooks.validated(0, self.losses, tokens=0)

    def run(
        self,
        steps: range,
        micro_batches: Callable[[int], Sequence[MicroBatch]],
        stream_states: Callable[[int], Sequence[Any] | None],
    ) -> int | None:
        """Take these steps. Collective.

        Args:
            micro_batches: this replica's of a step; asked for each step once, in order.
            stream_states: what a checkpoint of a step holds of streamed data.

        Returns:
            None, or the step after which the ranks were asked to leave before the run's end.

        Raises:
            DstrainError: the loss is not a number, a hook failed, or the disk takes no more.
            ReplicasDifferError: see `Engine.check_replicas`.
        """
        config, control = self.config, self.control
        for step in steps:
            self.checkpoints.raise_if_failed()
            record = self._train(step, micro_batches, counted=step == min(steps.start + 1, config.steps))
            control.step_ended(step)
            record["memory"], asked = all_reduce_max([used_memory(self.device), self.leaving.wanted()])
            validated = bool(self.validation) and _due(step, config.eval_every, config.steps)
            if validated:
                with control.busy("validation loss"):
                    self.losses = self.validation.losses()
                record |= self.losses
            self._tell(step, record, validated=validated)
            if config.check_every and _due(step, config.check_every, config.steps):
                self.engine.check_replicas()
            # These take their time, in which a rank may have been asked to leave.
            if validated or self.plan.hooks:
                asked = self.leaving.agreed()
            leave = bool(asked) and step < config.steps
            if self.schedule.due(step) or (leave and config.saves):
                with control.busy("checkpoint"):
                    if self.metrics:
                        self.metrics.flush_to_disk()  # a checkpoint must not be ahead of its metrics
                    self.checkpoints.save(self.engine, step, stream_states(step))
                self.schedule.saved()
            if leave:
                return step
        return None

    def _train(
        self, step: int, micro_batches: Callable[[int], Sequence[MicroBatch]], *, counted: bool
    ) -> dict[str, Any]:
        """Take one step; returns its metrics.

        Args:
            counted: count the bytes that ranks exchange in it.
        """
        config, lr = self.config, self.lr_of(step)
        counted = counted and self.plan.layout.world_size > 1
        began = time.perf_counter()
        # Dropout draws from a state that depends on the step alone: a resumed run repeats it.
        torch.manual_seed(config.seed + 1_000_003 * step + self.rank)
        with self.traffic.counting() if counted else nullcontext():
            result = self.engine.train_batch(micro_batches(step), lr)
        _refuse_no_number(step, result, config.precision)
        record: dict[str, Any] = {
            "step": step,
            "loss": result.loss,
            "lr": lr,
            "grad_norm": result.grad_norm if result.applied else None,
            "tokens": step * self.plan.batch.tokens,
            "seconds": round(time.perf_counter() - began, 4),
        }
        if counted:
            record |= self.traffic.largest()
        if config.precision == "fp16":
            record |= {"loss_scale": result.loss_scale, "skipped": not result.applied}
        return record

    def _tell(self, step: int, record: dict[str, Any], *, validated: bool) -> None:
        """Write a step's metrics, and tell the console and the hooks."""
        if self.metrics:
            self.metrics.write(record)
        if self.console:
            self.console.write(_line(record, self.config.steps) + "\n")
        self.hooks.stepped(step, record)
        if validated:
            self.hooks.validated(step, self.losses, tokens=record["tokens"])
        self.hooks.saved(self.checkpoints.take_completed())


def _refuse_no_number(step: int, result: StepResult, precision: str) -> None:
    """Stop a training that has left the numbers. Every rank sees the same result.

    Only fp16's loss scale skips steps on purpose; elsewhere DeepSpeed skips a step whose gradient is no
    number, or reports its norm as -1, and would go on without learning anything.
    """
    if precision == "fp16" and not result.applied:
        return
    is_number = math.isfinite(result.loss) and math.isfinite(result.grad_norm) and result.grad_norm >= 0
    if result.applied and is_number:
        return
    what = f"the loss is {result.loss}"
    if math.isfinite(result.loss):
        what = "the gradient norm is not finite"
    raise DstrainError(
        f"{what} at step {step}",
        hint="a smaller --lr, more --set warmup_steps=N, or --precision fp32",
    )


def _due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def _line(record: Mapping[str, Any], steps: int) -> str:
    """One line for a console that is no terminal."""
    validation = f"  validation {record['validation_loss']:.4f}" if "validation_loss" in record else ""
    norm = f"{record['grad_norm']:.3f}" if record["grad_norm"] is not None else "skipped"
    return f"step {record['step']}/{steps}  loss {record['loss']:.4f}{validation}  lr {record['lr']:.2e}  grad {norm}"
