"""Layouts that are trained in turn, step by step, so that what else a machine does falls on all of them alike."""

from __future__ import annotations

import threading
import time
from multiprocessing import Pipe
from typing import Any

from dstrain.planning.plan import Plan
from tests.support.distributed.workers import run


class TrainedLayout:
    """One plan's ranks. They sleep until they are asked for a step."""

    def __init__(self, plan: Plan, model: Any, threads: int = 1) -> None:
        """``model``: the Hugging Face config that the plan was made for. ``threads``: of each rank."""
        ends = [Pipe() for _ in range(plan.layout.world_size)]
        self._ranks = [here for here, _ in ends]
        job = (plan, model, threads, [there for _, there in ends])
        self._thread = threading.Thread(
            target=run, args=(plan.layout.world_size, _train, *job), kwargs={"timeout": 1800.0}, daemon=True
        )
        self._thread.start()

    def step(self) -> float:
        """Seconds of one optimizer step, from when all ranks are ready until the last one is done."""
        for rank in self._ranks:
            rank.send("step")
        while not all(rank.poll(0.5) for rank in self._ranks):
            if not self._thread.is_alive():
                raise RuntimeError("a rank failed; what it said stands above")
        return max(float(rank.recv()) for rank in self._ranks)

    def close(self) -> None:
        for rank in self._ranks:
            rank.send("end")
        self._thread.join()


def _train(rank: int, plan: Plan, model: Any, threads: int, ends: list[Any]) -> None:
    import torch
    from torch import distributed

    from dstrain.engine.build import build_engine, start_communication
    from dstrain.engine.interface import MicroBatch
    from dstrain.model.pipeline_model import PipelineModel

    torch.set_num_threads(threads)
    start_communication()
    engine = build_engine(
        PipelineModel(model, seed=1),
        deepspeed=plan.deepspeed,
        cut=plan.layout.cut,
        pipeline=plan.layout.pipeline,
        data_parallel=plan.layout.data_parallel,
        schedule=plan.layout.schedule,
        device=torch.device("cpu"),
        activation_checkpointing=plan.config["activation_checkpointing"],
        loss_chunk=plan.loss_chunk,
    )
    batch = plan.batch
    positions = torch.arange(batch.seq_len).repeat(batch.micro_batch, 1)
    weight = torch.tensor([1.0 / (batch.micro_batch * batch.seq_len)])
    while ends[rank].recv() == "step":
        rows = torch.randint(model.vocab_size, (batch.accumulation, batch.micro_batch, batch.seq_len))
        distributed.barrier()
        began = time.perf_counter()
        engine.train_batch([MicroBatch(row, positions, row, weight) for row in rows], 1e-4)
        ends[rank].send(time.perf_counter() - began)
