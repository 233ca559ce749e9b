"""Builds the micro-batches of one replica from sample numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from dstrain.data.rows.mixture import Order
from dstrain.data.rows.order import dealt, hash_words
from dstrain.data.rows.packing import Rows
from dstrain.engine.interface import MicroBatch
from dstrain.model.document_lengths import document_lengths
from dstrain.planning.batch import Batch


class TrainBatches:
    """The micro-batches of each step: which samples they hold depends on config, seed and step alone."""

    def __init__(self, rows: Rows, batch: Batch, *, order: Order, replica: int, seed: int = 0) -> None:
        self.rows = rows
        self.batch = batch
        self.replica = replica
        self.order = order
        self.seed = seed

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """This replica's micro-batches of ``step`` (from 1)."""
        samples = self.order.sample_ids(step)
        label_tokens = int(self.rows.label_tokens(samples).sum())
        weight = self.batch.accumulation * self.batch.data_parallel / max(1, label_tokens)
        places = dealt(
            np.arange(samples.size),
            replica=self.replica,
            replicas=self.batch.data_parallel,
            micro_batch=self.batch.micro_batch,
        )
        return [
            make_micro_batch(self.rows, samples[part], weight, row_seeds(self.seed, step, part))
            for part in places
        ]


class ValidationBatches:
    """The same samples of a validation set every time, divided among the replicas.

    Where they do not fill the last micro-batches, or ``fewest`` of them, rows without a label stand in:
    they add nothing. ``pinned``: in memory of the host that a GPU copies from by itself.
    """

    def __init__(
        self, rows: Rows, batch: Batch, *, samples: int, replica: int, fewest: int, pinned: bool = False
    ) -> None:
        ids = np.arange(min(samples, len(rows)))
        share = batch.micro_batch * batch.data_parallel
        count = max(fewest, math.ceil(len(ids) / share))
        self.label_tokens = int(rows.label_tokens(ids).sum())
        weight = count * batch.data_parallel / max(1, self.label_tokens)
        padded = np.concatenate([ids, np.full(count * share - len(ids), -1)])
        parts = padded.reshape(count, batch.data_parallel, batch.micro_batch)[:, replica]
        made = [make_micro_batch(rows, part, weight) for part in parts]
        self._micro_batches = [one.pinned() for one in made] if pinned else made

    def micro_batches(self) -> list[MicroBatch]:
        return self._micro_batches


def row_seeds(seed: int, step: int, places: Iterable[int]) -> tuple[int, ...]:
    """What is drawn in a step for the rows at these places of its global batch is drawn from: 63 bits each."""
    return tuple(hash_words(seed, step, int(place)) >> 1 for place in places)


def make_micro_batch(rows: Rows, ids: np.ndarray, weight: float, seeds: Sequence[int] = ()) -> MicroBatch:
    """The samples ``ids`` as tensors; a negative id is a row without labels.

    Args:
        seeds: of the rows; empty where nothing is drawn for them.
    """
    batch = rows.rows(np.maximum(ids, 0))
    labels = np.where((ids < 0)[:, None], -100, batch.labels)
    position_ids = torch.from_numpy(np.ascontiguousarray(batch.position_ids))
    return MicroBatch(
        input_ids=torch.from_numpy(np.ascontiguousarray(batch.input_ids)),
        position_ids=position_ids,
        labels=torch.from_numpy(np.ascontiguousarray(labels)),
        weight=torch.tensor([weight], dtype=torch.float32),
        documents=document_lengths(position_ids, seeds),
    )
