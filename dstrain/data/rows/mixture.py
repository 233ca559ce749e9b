"""Several sources as one: which row of which source stands at which place of a run, computed and not stored.

All samples of a run stand in one line, and `dstrain.mixture_shares` says how many of its first ``p`` places are of
each source. In what order the rows of a step come is shuffled. Each source is read in an order of its own, a fresh
shuffle each epoch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import numpy as np

from dstrain.data.rows.order import hash_words, permute, shuffled_rows
from dstrain.data.rows.packing import Batch, Rows
from dstrain.mixture_shares import MixturePhase, rows_before, rows_of_sources

_STEP_SALT = 0x6D697874757265  # "mixture": the shuffle of a step must not share its hash with anything else


class Order(Protocol):
    """Which rows the steps of a run take."""

    def sample_ids(self, step: int) -> np.ndarray:
        """The rows of the step's global batch: int64 [global_batch], steps counted from 1."""

    def given_before(self, step: int) -> list[int]:
        """How many rows each source has given before the step, epoch after epoch."""


class RowsInOrder:
    """The rows of one source one after the other, as a stream has them."""

    def __init__(self, global_batch: int) -> None:
        self.global_batch = global_batch

    def sample_ids(self, step: int) -> np.ndarray:
        """The rows of the step's global batch: int64 [global_batch], steps counted from 1."""
        if step < 1:
            raise ValueError(f"steps are counted from 1, not {step}")
        return np.arange((step - 1) * self.global_batch, step * self.global_batch, dtype=np.int64)

    def given_before(self, step: int) -> list[int]:
        """How many rows were given before the step."""
        return [(step - 1) * self.global_batch]


class MixtureOrder:
    """The rows of each step as a pure function of (sources, phases, global batch, seed, step).

    Rows are numbered through: those of the second source follow those of the first.

    Args:
        rows: of each source, by its name; at least one each.
        phases: in the order of their steps. The last one goes on without end.
        global_batch: rows per step over all replicas and micro-batches, at least 1.
        seed: any integer; taken modulo 2**64.
        in_order: sources whose rows are taken in their order, and not shuffled.
    """

    def __init__(
        self,
        rows: dict[str, int],
        phases: Sequence[MixturePhase],
        global_batch: int,
        seed: int,
        in_order: Collection[str] = (),
    ) -> None:
        self.global_batch = global_batch
        self.seed = seed
        self._names = tuple(rows)
        self._rows = tuple(rows.values())
        self._first_ids = _first_ids(self._rows)
        self._phases = tuple(phases)
        self._before = rows_before(phases, global_batch, len(rows))
        self._in_order = frozenset(in_order)

    def sample_ids(self, step: int) -> np.ndarray:
        """The rows of the step's global batch: int64 [global_batch], steps counted from 1."""
        if step < 1:
            raise ValueError(f"steps are counted from 1, not {step}")
        ids = np.empty(self.global_batch, np.int64)
        for number, (here, places) in self._places(step).items():
            name, rows = self._names[number], self._rows[number]
            if name not in self._in_order:
                places = shuffled_rows(places, rows, self.seed, _key(name))
            ids[here] = self._first_ids[number] + places
        of_step = np.arange(self.global_batch, dtype=np.uint64)
        key = hash_words(self.seed, step, _STEP_SALT)
        shuffled: np.ndarray = ids[permute(of_step, self.global_batch, key)]
        return shuffled

    def given_before(self, step: int) -> list[int]:
        """How many rows each source has given before the step, epoch after epoch."""
        place = (step - 1) * self.global_batch
        phase = self._phase_at(place)
        begin, given = self._before[phase]
        found = list(given)
        for number, count in rows_of_sources(place - begin, self._phases[phase].parts).items():
            found[number] += count
        return found

    def _phase_at(self, place: int) -> int:
        """A phase ends with a step, so that a step is in one alone."""
        ends = (end for end, _ in self._before[1:])
        return next((at for at, end in enumerate(ends) if place < end), len(self._phases) - 1)

    def _places(self, step: int) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Of each source in the step: where in the batch its rows stand, and how many it has given before each."""
        first = (step - 1) * self.global_batch
        phase = self._phase_at(first)
        begin, given = self._before[phase]
        line = np.arange(first - begin, first - begin + self.global_batch + 1, dtype=np.int64)
        found = {}
        for number, counts in rows_of_sources(line, self._phases[phase].parts).items():
            here = np.flatnonzero(np.diff(counts))
            if here.size:
                found[number] = (here, given[number] + counts[here])
        return found


class MixedRows:
    """The rows of several sources, numbered through."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        self.seq_len = parts[0].seq_len
        self._parts = tuple(parts)
        self._first_ids = _first_ids([len(part) for part in parts])
        self._rows = sum(len(part) for part in parts)

    def __len__(self) -> int:
        return self._rows

    def rows(self, ids: np.ndarray) -> Batch:
        """The rows with these numbers: int [n] -> three int64 [n, seq_len]. IndexError if there is none."""
        batch = Batch(*(np.empty((len(ids), self.seq_len), np.int64) for _ in Batch._fields))
        for part, here, inner in self._of_each(ids):
            for whole, found in zip(batch, part.rows(inner), strict=True):
                whole[here] = found
        return batch

    def label_tokens(self, ids: np.ndarray) -> np.ndarray:
        """How many labels of each of these rows count in the loss: int [n] -> int64 [n]."""
        return self._counts(ids, lambda part, inner: part.label_tokens(inner))

    def filled(self, ids: np.ndarray) -> np.ndarray:
        """How many tokens of each of these rows are not padding: int [n] -> int64 [n]."""
        return self._counts(ids, lambda part, inner: part.filled(inner))

    @property
    def padding(self) -> float:
        """The share of tokens that only fill rows up."""
        padded = sum(part.padding * len(part) for part in self._parts)
        return float(padded / max(1, self._rows))

    def source_of(self, row: int) -> int:
        """The number of the source that has this row."""
        return int(np.searchsorted(self._first_ids, row, side="right")) - 1

    def _counts(self, ids: np.ndarray, of: Callable[[Rows, np.ndarray], np.ndarray]) -> np.ndarray:
        counts = np.empty(len(ids), np.int64)
        for part, here, inner in self._of_each(ids):
            counts[here] = of(part, inner)
        return counts

    def _of_each(self, ids: np.ndarray) -> list[tuple[Rows, np.ndarray, np.ndarray]]:
        """Each source that has some of these rows, where in ``ids`` they stand, and their numbers in it."""
        ids = np.asarray(ids, np.int64)
        if ids.size and (ids.min() < 0 or ids.max() >= self._rows):
            raise IndexError(f"rows {ids.min()}..{ids.max()} are asked for, and there are {self._rows}")
        number = np.searchsorted(self._first_ids, ids, side="right") - 1
        found = []
        for at, part in enumerate(self._parts):
            here = np.flatnonzero(number == at)
            if here.size:
                found.append((part, here, ids[here] - self._first_ids[at]))
        return found


def _first_ids(rows: Sequence[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(rows)[:-1]]).astype(np.int64)


def _key(name: str) -> int:
    """Of a source's shuffle: its name, so that its place in the list does not matter."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
