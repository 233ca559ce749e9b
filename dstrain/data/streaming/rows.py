"""The rows of a stream, as training asks for them: by numbers that count up, from the ring of this host."""

from __future__ import annotations

import os
import threading
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from dstrain.child_process import ChildProcess
from dstrain.data.rows.packing import Batch
from dstrain.data.streaming.ring import AHEAD, RingFolder, RingReader
from dstrain.data.streaming.segments import Segment
from dstrain.data.streaming.state import StreamState
from dstrain.data.streaming.stream import StreamRequest
from dstrain.files import write_json

ENDLESS = 2**40
"""How many rows there are: more than any training takes, and few enough for those of many sources to be counted."""
_KEPT = 10_000
"""Segments whose states are kept when their rows are gone."""
_SHORTEST, _LONGEST = 0.001, 0.05


class StreamRows:
    """Rows by their numbers 0, 1, 2, ...; implements `dstrain.data.rows.packing.Rows`.

    `label_tokens` is asked for all rows of a step before its rows are: those with smaller numbers than the smallest of
    that question are given up. One thread asks for rows; `state_before` and `close` may be called by another one.

    Args:
        request: what is streamed.
        fingerprint: that of the stream, which the files must still have.
    """

    def __init__(self, request: StreamRequest, fingerprint: str) -> None:
        self.request = request
        self.fingerprint = fingerprint
        self.seq_len = request.seq_len
        self._segments: deque[Segment] = deque()  # those that may be asked for, in their order
        self._states: deque[StreamState] = deque()  # of these and those before them
        self._next = 0  # the number of the segment that follows
        self._begin = self._after = (
            StreamState()
        )  # how to make the first row, and what follows the newest segment
        self._lock = threading.Lock()  # of all these
        self._advancing = threading.Lock()
        self._closed = threading.Event()
        self._ring: RingFolder | None = None
        self._reader: RingReader | None = None
        self._process: ChildProcess | None = None
        self._filled = self._seen = 0
        self._waits = False

    def open(
        self,
        folder: Path,
        name: str,
        *,
        reader: int = 0,
        readers: int = 1,
        state: Mapping[str, Any] | None = None,
        workers: int = 0,
        ahead: int = AHEAD,
    ) -> StreamRows:
        """Begin to stream, once; used as a context, the process that makes the rows and the ring are gone at its end.

        Args:
            folder: of the host's cache, for the ring.
            name: of the ring, without a dot; the same on all ranks of a host, and of no other stream, run or launch.
            reader: which of the host's ranks this is. The first one, 0, starts the process, which ends with the thread
                that calls; its stream is opened before the others ask for rows.
            readers: how many of them there are.
            state: of a checkpoint, from `state_before`; None: from the first row on.
            workers: processes that tokenize; 0: the one that makes the rows does it.
            ahead: segments that are made ahead.

        Raises:
            DstrainError: the state is none.
            OSError: the ring's folder can't be made.
        """
        if state is not None:
            self._begin = self._after = StreamState.from_json(state)
        self._ring = RingFolder.below(folder, name)
        self._reader = RingReader(self._ring, reader)
        if reader == 0:
            asked = {
                "stream": self.request.to_json(),
                "fingerprint": self.fingerprint,
                "state": self._begin.to_json(),
                "readers": readers,
                "workers": workers,
                "ahead": ahead,
            }
            self._ring.make()
            write_json(self._ring.request, asked)
            environment = os.environ | {"PYTHONWARNINGS": "ignore"}
            self._process = ChildProcess(
                "dstrain.data.streaming.producer", [str(self._ring.path)], environment, own_stderr=True
            )
        return self

    def __len__(self) -> int:
        return ENDLESS

    def rows(self, ids: np.ndarray) -> Batch:
        """The rows with these numbers: int [n] -> three int64 [n, seq_len]. Waits until they are made.

        Raises:
            IndexError: one was given up, or comes before those that are streamed.
            DstrainError: what the process that makes them has failed with.
        """
        ids = np.asarray(ids, dtype=np.int64)
        parts = Batch(*(np.empty((ids.size, self.seq_len), np.int64) for _ in Batch._fields))
        for segment, which in self._found(ids):
            for part, found in zip(parts, segment.rows(ids[which] - segment.first), strict=True):
                part[which] = found
        return parts

    def label_tokens(self, ids: np.ndarray) -> np.ndarray:
        """How many labels of each of these rows count in the loss: int [n] -> int64 [n]. Gives up rows before them.

        Raises: as `rows`.
        """
        counts = self._counts(ids, lambda segment: segment.label_tokens)
        if counts.size:
            self._give_up(int(np.min(ids)))
        return counts

    def filled(self, ids: np.ndarray) -> np.ndarray:
        """How many tokens of each of these rows are not padding: int [n] -> int64 [n].

        Raises: as `rows`.
        """
        return self._counts(ids, lambda segment: segment.filled)

    @property
    def padding(self) -> float:
        """The share of tokens that only fill rows up, of the rows that were made so far."""
        return 1.0 - self._filled / (self._seen * self.seq_len) if self._seen else 0.0

    def state_before(self, row: int) -> dict[str, Any]:
        """What a checkpoint keeps to go on at a row: an object of JSON. Waits until the row before it is made.

        Raises:
            IndexError: the row lies too far back.
            DstrainError: as `rows`.
        """
        self._advance_to(row)
        with self._lock:
            if row == self._after.first:
                return self._after.at(row).to_json()
            at = bisect_right(self._states, row, key=lambda state: state.first)
            if not at or row < self._begin.row:
                raise IndexError(f"row {row} lies before those whose place is known")
            return self._states[at - 1].at(row).to_json()

    def check_before(self, row: int) -> str:
        """A hash of rows up to the one before that: hosts that make the same rows have the same. Empty where none was
        made before it since the stream was opened.

        Raises: as `state_before`.
        """
        if row <= self._begin.row:
            return ""
        self._advance_to(row)
        with self._lock:
            at = bisect_right(self._states, row - 1, key=lambda state: state.first)
            if not at:
                raise IndexError(f"row {row} lies before those whose place is known")
            return self._states[at - 1].check

    def waits_for(self) -> str:
        """The file that is read, or fetched, for a row that is waited for; empty where none is waited for."""
        if not self._waits or self._ring is None:
            return ""
        return self._ring.reading() or self.request.source

    def close(self) -> None:
        """End the process and remove the ring, in the rank that has started it. Who waits for a row gets an error."""
        self._closed.set()
        if self._reader is not None:
            self._reader.close()
        if self._process is not None and self._ring is not None:
            process, self._process = self._process, None
            if process.has_ended():
                self._ring.fail(self._ring.failure())
            process.__exit__(None, None, None)
            self._ring.remove()

    def __enter__(self) -> StreamRows:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _counts(self, ids: np.ndarray, of: Callable[[Segment], np.ndarray]) -> np.ndarray:
        """What a segment says of each of its rows, for these rows: int [n] -> int64 [n]."""
        ids = np.asarray(ids, dtype=np.int64)
        counts = np.empty(ids.size, np.int64)
        for segment, which in self._found(ids):
            counts[which] = of(segment)[ids[which] - segment.first]
        return counts

    def _found(self, ids: np.ndarray) -> list[tuple[Segment, np.ndarray]]:
        """The segments in which these rows lie, with a mask of ``ids`` for each."""
        if not ids.size:
            return []
        first, last = int(ids.min()), int(ids.max())
        self._advance_to(last + 1)
        with self._lock:
            if first < self._begin.row or first < self._segments[0].first:
                oldest = max(self._begin.row, self._segments[0].first)
                raise IndexError(f"row {first} is asked for, and the oldest that is kept is {oldest}")
            touched = [one for one in self._segments if one.first <= last and one.end > first]
        return [(one, which) for one in touched if (which := (ids >= one.first) & (ids < one.end)).any()]

    def _advance_to(self, row: int) -> None:
        """Take segments in until all rows before that one are there."""
        with self._advancing:
            while self._after.first < row:
                self._take_in(self._wait_for_next())

    def _wait_for_next(self) -> Segment:
        assert self._reader is not None, "the stream was not opened"
        pause = _SHORTEST
        self._waits = True
        try:
            while not self._closed.is_set():
                process = self._process
                segment = self._reader.segment(self._next, process is not None and process.has_ended())
                if segment is not None:
                    return segment
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST)
        finally:
            self._waits = False
        raise RuntimeError("the stream is closed")

    def _take_in(self, segment: Segment) -> None:
        with self._lock:
            self._segments.append(segment)
            self._states.append(segment.state)
            if len(self._states) > _KEPT:
                self._states.popleft()
            self._after = segment.after
            self._next += 1
            self._filled += int(segment.filled.sum())
            self._seen += segment.filled.size

    def _give_up(self, below: int) -> None:
        """Let the segments go whose rows are all before that one."""
        with self._lock:
            while len(self._segments) > 1 and self._segments[0].end <= below:
                self._segments.popleft()
            if self._reader is not None:
                self._reader.release(self._next - len(self._segments))
