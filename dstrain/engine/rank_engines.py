"""DeepSpeed's two engines behind one interface."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.runtime.zero.partition_parameters import GatheredParameters

from dstrain.engine.async_checkpoint import AsyncCheckpointStage
from dstrain.engine.checkpoint_files import PARAMETER_NAMES, TAG
from dstrain.engine.checkpoint_state import SavedState
from dstrain.engine.client_optimizer import ClientOptimizer, hugging_face_name
from dstrain.engine.deepspeed_patches import PatchedEngine, on_host
from dstrain.engine.interface import Engine, MicroBatch, StepResult
from dstrain.engine.pipeline_engine import DualPipeVStagedEngine, StagedEngine
from dstrain.engine.replica_consistency import check_replicas
from dstrain.engine.restore import restore
from dstrain.lora import is_adapter_parameter
from dstrain.model.adapters import has_adapters
from dstrain.model.document_lengths import note_lengths
from dstrain.model.head_output import HeadOutputRequest


class _RankEngine(Engine):
    """What both share."""

    engine: PatchedEngine
    optimizer: ClientOptimizer | None
    _states_were_checked = False

    def _set_lr(self, lr: float) -> None:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr

    def _result(self) -> StepResult:
        engine = self.engine
        applied = engine.was_step_applied()
        norm = engine.get_global_grad_norm()
        if applied and self.optimizer is not None and not self._states_were_checked:
            self.optimizer.refuse_what_a_checkpoint_cannot_hold(engine.basic_optimizer)
            self._states_were_checked = True
        # fp16 takes no norm of gradients that overflow, and so does not read the loss with it.
        loss = engine.step_loss_on_host
        return StepResult(
            loss=float(on_host(engine.step_loss)) if loss is None else loss,
            grad_norm=float("inf") if norm is None or not applied else float(norm),
            applied=applied,
            loss_scale=float(getattr(engine.optimizer, "loss_scale", 1.0)),
        )

    def check_replicas(self) -> None:
        check_replicas(self.engine)

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        self._release_gathered()
        for name, parameter in self._named_parameters():
            with GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                value = parameter.detach().to("cpu", torch.float32, copy=True)
            yield name, value  # behind the gathering: whoever takes it may be slow
            del value  # before the next one is made

    def help_with_weights(self) -> None:
        self._release_gathered()
        for _, parameter in self._named_parameters():
            with GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                pass

    def _release_gathered(self) -> None:
        """ZeRO-3 ends an evaluation with weights on their way, for a backward pass that does not come. They can't be
        gathered one by one then."""
        if self.engine.zero_optimization_partition_weights():
            self.engine.optimizer.checkpoint_event_prologue()

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in self._named_parameters()}

    @cached_property
    def _has_adapters(self) -> bool:
        return has_adapters(self.engine.module)

    def _named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """By Hugging Face name; a tied weight under each of its names. Of a model with adapters these alone."""
        for name, parameter in self.engine.module.named_parameters(remove_duplicate=False):
            if not self._has_adapters or is_adapter_parameter(name):
                yield hugging_face_name(name), parameter

    def save(self, folder: Path, state: Mapping[str, Any], held: AsyncCheckpointStage | None = None) -> None:
        ours = dict(state)
        if not self.engine.zero_optimization():
            ours[PARAMETER_NAMES] = self._parameter_names()
        with held.in_place_of_writer(self.engine) if held is not None else nullcontext():
            self.engine.save_checkpoint(
                str(folder),
                tag=TAG,
                client_state={"dstrain": ours},
                save_latest=False,
                exclude_frozen_parameters=self._has_adapters,  # the model that they adapt lies elsewhere
            )

    def _parameter_names(self) -> list[list[list[str]]]:
        """All names of each trained parameter, by optimizer group."""
        names: dict[torch.nn.Parameter, list[str]] = {}
        for name, parameter in self.engine.module.named_parameters(remove_duplicate=False):
            names.setdefault(parameter, []).append(name)
        return [[names[p] for p in group["params"]] for group in self.engine.optimizer.param_groups]

    def load(
        self, folder: Path, *, other_layout: bool = False, say: Callable[[str], None] = print
    ) -> dict[str, Any]:
        if other_layout:
            return restore(self.engine, SavedState(folder), say)
        path, client_state = self.engine.load_checkpoint(
            str(folder),
            tag=TAG,
            load_module_strict=not self._has_adapters,
            load_lr_scheduler_states=False,
        )
        if path is None:
            raise FileNotFoundError(f"DeepSpeed found no checkpoint in {folder}")
        state: dict[str, Any] = client_state["dstrain"]
        return state


class PipelinedEngine(_RankEngine):
    """Two stages or more."""

    def __init__(
        self, engine: StagedEngine | DualPipeVStagedEngine, optimizer: ClientOptimizer | None = None
    ) -> None:
        self.engine: StagedEngine | DualPipeVStagedEngine = engine
        self.optimizer = optimizer
        self.fewest_micro_batches = engine.fewest_micro_batches

    def train_batch(self, micro_batches: Sequence[MicroBatch], lr: float) -> StepResult:
        self._set_lr(lr)
        # Before DeepSpeed, which would copy them to other memory of the host first, and wait for each.
        here = [m.to(self.engine.device) for m in micro_batches]
        self.engine.batch = here
        self.engine.train_batch(iter([m.as_pipeline_item() for m in here]))
        return self._result()

    def eval_loss(self, micro_batches: Sequence[MicroBatch]) -> float:
        here = [m.to(self.engine.device) for m in micro_batches]
        items = iter([m.as_pipeline_item() for m in here])
        self.engine.batch = here
        return float(self.engine.eval_batch(items, num_micro_batches=len(micro_batches)))

    def next_token_logits(self, micro_batch: MicroBatch, row: int, position: int) -> torch.Tensor:
        engine = self.engine
        head = engine.module.head
        here = [replace(micro_batch, documents=None).to(engine.device)] * engine.fewest_micro_batches
        engine.batch = here
        with head.asked(position=(row, position)) if head is not None else nullcontext():
            _, logits = engine.eval_batch(
                iter([m.as_pipeline_item() for m in here]),
                return_logits=True,
                compute_loss=False,
                reduce_output=None,
                bcast_loss=False,
                num_micro_batches=len(here),
            )
        source = engine._loss_stage_global_rank()
        vocabulary = torch.zeros(1, dtype=torch.int64, device=engine.device)
        chosen: torch.Tensor | None = None
        if engine.global_rank == source:
            chosen = logits.detach().float().contiguous()
            vocabulary.fill_(chosen.numel())
        group = engine.mpu.get_pipe_parallel_group()
        dist.broadcast(vocabulary, src=source, group=group)
        if chosen is None:
            chosen = torch.empty(int(vocabulary), dtype=torch.float32, device=engine.device)
        dist.broadcast(chosen, src=source, group=group)
        return chosen.cpu()


class OneStageEngine(_RankEngine):
    """One stage: DeepSpeed's plain engine, which overlaps communication and knows ZeRO-3."""

    def __init__(
        self, engine: PatchedEngine, head: HeadOutputRequest, optimizer: ClientOptimizer | None = None
    ) -> None:
        self.engine: PatchedEngine = engine
        self.optimizer = optimizer
        self.head = head

    def _loss(self, micro_batch: MicroBatch) -> torch.Tensor:
        here = micro_batch.to(self.engine.device)
        note_lengths(here.position_ids, here.documents)
        with self.head.asked(target=(here.labels, here.weight)):
            loss: torch.Tensor = self.engine((here.input_ids, here.position_ids))
            return loss

    def train_batch(self, micro_batches: Sequence[MicroBatch], lr: float) -> StepResult:
        self._set_lr(lr)
        self.engine.train()
        total = torch.zeros((), device=self.engine.device)
        for number, micro_batch in enumerate(micro_batches, start=1):
            loss = self._loss(micro_batch)
            self.engine.backward(loss)
            total += loss.detach()
            del loss  # its graph, and what layers keep in it past autograd's hooks
            if number == len(micro_batches):
                self.engine.step_loss = _mean_over_replicas(total / number)
            self.engine.step()
        return self._result()

    @torch.no_grad()
    def eval_loss(self, micro_batches: Sequence[MicroBatch]) -> float:
        self.engine.eval()
        total = torch.zeros((), device=self.engine.device)
        for micro_batch in micro_batches:
            total += self._loss(micro_batch)
        return float(_mean_over_replicas(total / len(micro_batches)))

    @torch.no_grad()
    def next_token_logits(self, micro_batch: MicroBatch, row: int, position: int) -> torch.Tensor:
        self.engine.eval()
        here = micro_batch.to(self.engine.device)
        note_lengths(here.position_ids, here.documents)
        with self.head.asked(position=(row, position)):
            logits: torch.Tensor = self.engine((here.input_ids, here.position_ids))
            return logits.float().cpu()


def _mean_over_replicas(value: torch.Tensor) -> torch.Tensor:
    value = value.clone()
    dist.all_reduce(value)
    mean: torch.Tensor = value / dist.get_world_size()
    return mean
