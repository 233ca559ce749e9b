"""Bytes that a rank really sends in a step of a case, as the product's own count has them."""

from __future__ import annotations

from typing import Any

import torch

from dstrain.engine.traffic_count import Sent, TrafficCount
from tests.support.distributed.training import Case, build_case_engine, make_case_plan, samples


def bytes_of_a_step(rank: int, case: Case, zero_keys: dict[str, Any]) -> Sent:
    """What this rank sends in the second step of a case, with other values of some ``zero_optimization`` keys."""
    from dstrain.engine.interface import MicroBatch

    count = TrafficCount()
    plan = make_case_plan(case)
    plan.deepspeed["zero_optimization"].update(zero_keys)
    engine, plan = build_case_engine(case, plan)
    replica = plan.layout.replica(rank)
    for step in (1, 2):
        ids, positions, labels = samples(step)
        parts = []
        for index in range(case.accumulation):
            start = (index * case.data_parallel + replica) * case.micro_batch
            rows = slice(start, start + case.micro_batch)
            parts.append(MicroBatch(ids[rows], positions[rows], labels[rows], torch.tensor([1.0])))
        with count.counting():
            engine.train_batch(parts, case.lr)
    return count.sent
