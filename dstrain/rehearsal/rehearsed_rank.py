"""What a rank would do on its GPU: build, training steps, validation, checkpoints and their loading, generation."""

from __future__ import annotations

import gc
import os
import resource
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from dstrain.engine.build import start_communication
from dstrain.engine.interface import DTYPES, Engine, MicroBatch
from dstrain.engine.restore import restore
from dstrain.engine.traffic_count import TrafficCount
from dstrain.errors import DstrainError, place_of
from dstrain.model.document_lengths import DocumentLengths
from dstrain.model.pipeline_model import PipelineModel
from dstrain.model.unsplit_model import UnsplitModel
from dstrain.planning.plan import Plan
from dstrain.rehearsal.attention_kernels import AttentionKernels
from dstrain.rehearsal.checkpoint_in_memory import CheckpointInMemory
from dstrain.rehearsal.fake_cuda import FakeGpu, FakeMemory
from dstrain.rehearsal.fake_ranks import join_fake_world, receive_from_neighbours
from dstrain.rehearsal.fake_tensors import prepare_fake_tensors
from dstrain.rehearsal.foreign_checkpoint import ForeignCheckpoint
from dstrain.rehearsal.host_operators import install_host_operators
from dstrain.rehearsal.memory_owners import (
    held_parameters,
    note_gradients,
    optimizer_states,
    watch_gradients,
)
from dstrain.rehearsal.watch import Watch, shortened
from dstrain.runs.protocol import RankStatus
from dstrain.train.control_client import ControlClient
from dstrain.train.graceful_shutdown import GracefulShutdown
from dstrain.train.hooks import Hooks
from dstrain.train.lr_schedule import LearningRate
from dstrain.train.rank_engine import build_rank_engine, client_optimizer, make_model, token_loss
from dstrain.train.training_loop import TrainingLoop
from dstrain.train.validation import Validation

STEP = "step 2"
"""The step that is held against the plan: the optimizer has its states then."""


@dataclass(frozen=True)
class Request:
    """What a process is to rehearse.

    Attributes:
        plan: as `Plan.to_record` writes it.
        rank: which rank.
        vocabulary: size of the logits.
        gpu: what the rank's GPU says of itself.
        traced: say what is there at the fullest moment.
    """

    plan: Plan
    rank: int
    vocabulary: int
    gpu: FakeGpu
    traced: bool

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Request:
        plan, gpu = Plan.from_record(record["plan"]), FakeGpu.from_record(record["gpu"])
        return cls(**{**record, "plan": plan, "gpu": gpu})


class RehearsedRank:
    """One rank's rehearsal; `run` once in a process, which is good for nothing else afterwards.

    Args:
        memory: what the fake ``torch.cuda`` says of memory.
        waits: where it tells that the host waits.
    """

    def __init__(self, request: Request, memory: FakeMemory, waits: list[Callable[[str], None]]) -> None:
        self.request = request
        self.plan = request.plan
        self.watch = Watch(request.vocabulary, traced=request.traced)
        waits.append(self.watch.waited)
        memory.counted = lambda: self.watch.alive
        self.failures: list[dict[str, str]] = []
        self.seconds: dict[str, float] = {}
        self._starts: dict[str, tuple[int, int]] = {}

    def run(self) -> dict[str, Any]:
        """The answer, as JSON values."""
        layout = self.plan.layout
        mode = prepare_fake_tensors()
        install_host_operators()
        self.watch.groups = join_fake_world(self.request.rank, layout.world_size, self.watch.told_json)
        # What a model in layers consists of is found out on meta tensors, and with a few real numbers.
        model = make_model(self.plan) if self.plan.model.pipelines else None
        if layout.pipeline > 1:
            receive_from_neighbours(self._passed_on(model))
        kernels = AttentionKernels(self.request.gpu.capability)
        self.watch.seen_by = kernels.see
        traffic = TrafficCount()
        start_communication(self.plan.run_config.communication_timeout_seconds)
        device = torch.device(get_accelerator().current_device_name())
        with mode, self.watch:
            engine = None
            with self._phase("build"):
                engine = self._build(model if model is not None else make_model(self.plan), device)
            if engine is not None:
                self._use(engine, device, traffic)
        return self._answer(kernels)

    def _build(self, model: PipelineModel | UnsplitModel, device: torch.device) -> Engine:
        config = self.plan.run_config
        adapter = build_rank_engine(
            self.plan, model, device, token_loss(config), client_optimizer(config), run="rehearsal"
        )
        engine = self._engine_of(adapter)
        self.watch.shapes = {torch.Size(getattr(p, "ds_shape", p.shape)) for p in engine.module.parameters()}
        self.watch.own("parameters", held_parameters(engine))
        watch_gradients(engine, self.watch)
        gc.collect()
        return adapter

    def _use(self, adapter: Engine, device: torch.device, traffic: TrafficCount) -> None:
        engine = self._engine_of(adapter)
        with TemporaryDirectory() as folder:
            checkpoint = CheckpointInMemory(Path(folder), stages=self.plan.layout.pipeline)
            loop = self._training_loop(adapter, device, traffic, checkpoint)
            with self._phase("step 1"):
                self._train(loop, 1)
                self.watch.own("optimizer", optimizer_states(engine))
                note_gradients(engine, self.watch)
            with self._phase(STEP):
                self._train(loop, 2)
            if self.failures:
                return
            with self._phase("validation"):
                adapter.eval_loss(self._micro_batches(adapter.fewest_micro_batches))
            with self._phase("replica check"):
                adapter.check_replicas()
            with self._phase("checkpoint"):
                checkpoint.save(adapter, step=2)
            with self._phase("resume"):
                checkpoint.load(adapter)
            with self._phase("step 3"):
                self._train(loop, 3)
            if self.plan.run_config.offload != "nvme":  # whose checkpoints go on in their own layout alone
                with self._phase("resume in another layout"):
                    restore(engine, ForeignCheckpoint(engine), print)
                with self._phase("step 4"):
                    self._train(loop, 4)
        with self._phase("generation"):
            [micro_batch] = self._micro_batches(1)
            adapter.next_token_logits(micro_batch, 0, self.plan.batch.seq_len - 1)
        with self._phase("final weights"):
            for _ in adapter.weights():
                pass

    def _training_loop(
        self, adapter: Engine, device: torch.device, traffic: TrafficCount, checkpoint: CheckpointInMemory
    ) -> TrainingLoop:
        """That of a training, without what is due now and then: this has phases of its own."""
        plan, rank = self.plan, self.request.rank
        never = {"steps": 1_000_000, "eval_every": 0, "check_every": 0, "save_every": 0, "keep_every": 0}
        status = RankStatus(rank=rank, host="rehearsal", pid=os.getpid(), state="running")
        return TrainingLoop(
            plan=replace(plan, config={**plan.config, **never}, hooks=()),
            engine=adapter,
            device=device,
            rank=rank,
            lr_of=LearningRate.of(plan.run_config),
            traffic=traffic,
            validation=Validation([], adapter, plan.batch, samples=0, replica=0, device=device),
            checkpoints=checkpoint,
            leaving=GracefulShutdown(lambda: False, None),
            control=ControlClient({}, status),
            hooks=Hooks(),
            metrics=None,
            console=None,
            losses={},
        )

    def _train(self, loop: TrainingLoop, step: int) -> None:
        """One step. A step that is skipped would show another rank than the one that trains."""

        def micro_batches(step: int) -> list[MicroBatch]:
            return self._micro_batches(self.plan.batch.accumulation)

        loop.run(range(step, step + 1), micro_batches, lambda step: None)
        if not self._engine_of(loop.engine).was_step_applied():
            raise RuntimeError("the optimizer's step is skipped, as if a gradient were inf")

    @staticmethod
    def _engine_of(adapter: Engine) -> Any:
        return adapter.engine  # type: ignore[attr-defined]

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """What is done inside gets this name; what fails there is noted."""
        print(f"dstrain: {name} ...", file=sys.stderr, flush=True)
        self.watch.phase = name
        began, since = time.perf_counter(), self.watch.now()
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.failures.append(_failure(name, error))
        self.seconds[name] = round(time.perf_counter() - began, 1)
        self._starts[name] = (since, self.watch.now())

    def _micro_batches(self, number: int) -> list[MicroBatch]:
        """As the loader gives them: in pinned memory of the host."""
        batch = self.plan.batch
        rows = batch.micro_batch, batch.seq_len

        def ids() -> torch.Tensor:
            return torch.zeros(rows, dtype=torch.int64)

        # Packed rows have two documents each: how many there are changes next to nothing.
        packed = self.plan.run_config.pack
        edges = torch.zeros(batch.micro_batch * (2 if packed else 1) + 1, dtype=torch.int32)
        documents = DocumentLengths(packed, edges, batch.seq_len // 2 if packed else batch.seq_len)
        return [MicroBatch(ids(), ids(), ids(), torch.ones(1), documents).pinned() for _ in range(number)]

    def _passed_on(
        self, model: PipelineModel | UnsplitModel | None
    ) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """What a stage hands to the next one for each micro-batch: see `dstrain.model.layers.State`."""
        assert isinstance(model, PipelineModel), "a model in one piece has one stage"
        batch = self.plan.batch
        rows = batch.micro_batch, batch.seq_len
        return [
            ((*rows, model.config.hidden_size), DTYPES[self.plan.run_config.precision]),
            (rows, torch.int64),
            *((tuple(each.shape), each.dtype) for each in model.router_sums(torch.device("cpu"))),
        ]

    def _answer(self, kernels: AttentionKernels) -> dict[str, Any]:
        watch = self.watch
        phases = {name: watch.counted(since, until) for name, (since, until) in self._starts.items()}
        step = phases.get(STEP)
        return {
            "rank": self.request.rank,
            "stage": self.plan.layout.stage(self.request.rank),
            "peaks": step.peaks if step else {},
            "total": step.total if step else 0,
            "phase_totals": {name: counted.total for name, counted in phases.items()},
            "fullest": [list(row) for row in step.fullest.get("total", ())[:40]] if step else [],
            "messages": _rows(watch.messages),
            "waits": _rows(watch.waits),
            "wrong_devices": _rows(watch.wrong_devices),
            "attention": _rows(kernels.calls),
            "failures": self.failures,
            "seconds": self.seconds,
            "host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }


def _rows(counted: Counter[Any]) -> list[dict[str, Any]]:
    return [asdict(what) | {"count": count} for what, count in counted.items()]


def _failure(phase: str, error: Exception) -> dict[str, str]:
    if isinstance(error, DstrainError):
        return {"phase": phase, "error": str(error), "where": error.where or ""}
    said = next(iter(str(error).strip().splitlines()), "")
    file, _, line = (place_of(error) or "").rpartition(":")
    name = type(error).__name__
    return {
        "phase": phase,
        "error": f"{name}: {said}" if said else name,
        "where": f"{shortened(file)}:{line}",
    }
