"""Builds the micro-batches of the steps to come in a thread, while a step runs."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType

import torch
from deepspeed.accelerator import get_accelerator

from dstrain.engine.interface import MicroBatch

AHEAD = 2
"""Steps whose micro-batches are ready, or are being built, beside the one that runs."""
_LATE = 1.0
"""Seconds after which waiting for data is told of: a step that waits for them is no hang."""


class Prefetch:
    """The micro-batches of each step from ``first`` to ``last``, in this order and as ``build`` makes them.

    Nothing is built before the first step is taken. Used as a context, the thread has ended at its end, unless it waits
    for a file.

    Args:
        build: makes the micro-batches of a step; called in the thread, one step after the other.
        device: where they go: for a CUDA device they are copied to pinned memory, from which a copy runs beside the
            computing.
        late: entered while a step waits for longer than a second.
    """

    def __init__(
        self,
        build: Callable[[int], list[MicroBatch]],
        first: int,
        last: int,
        *,
        device: torch.device,
        late: Callable[[], AbstractContextManager[None]],
        ahead: int = AHEAD,
    ) -> None:
        self._build = build
        self._steps = range(first, last + 1)
        self._device = device
        self._late = late
        self._ahead = ahead
        self._ready: deque[list[MicroBatch]] = deque()
        self._taken = first - 1
        self._error: BaseException | None = None
        self._closed = False
        self._changed = threading.Condition()
        # A daemon: a rank that is told to end at once does not wait for a file.
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)

    def take(self, step: int) -> list[MicroBatch]:
        """The micro-batches of the step that follows the one of the last call; waits until they are there.

        Raises: what ``build`` has raised for this step, or one before it.
        """
        if step != self._taken + 1 or step not in self._steps:
            raise ValueError(f"step {step} is no step to take after step {self._taken}")
        if self._thread.ident is None:
            self._thread.start()
        if not self._wait(_LATE):
            with self._late():
                self._wait(None)
        with self._changed:
            if not self._ready:
                assert self._error is not None
                raise self._error
            self._taken = step
            self._changed.notify_all()
            return self._ready.popleft()

    def close(self) -> None:
        """Build no more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join(timeout=_LATE)

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _wait(self, seconds: float | None) -> bool:
        """Whether there is something to take, or why there is not."""
        until = None if seconds is None else time.monotonic() + seconds
        with self._changed:
            while not self._ready and self._error is None:
                left = None if until is None else until - time.monotonic()
                if left is not None and left <= 0:
                    return False
                self._changed.wait(left)
            return True

    def _run(self) -> None:
        try:
            if self._device.type == "cuda":  # of this thread: else pinning begins to use the first device
                get_accelerator().set_device(self._device.index)
            for step in self._steps:
                with self._changed:
                    # The one that runs is taken; those behind it are ready, and this one is built.
                    while len(self._ready) >= self._ahead and not self._closed:
                        self._changed.wait()
                    if self._closed:
                        return
                built = self._build(step)
                if self._device.type == "cuda":
                    built = [one.pinned() for one in built]
                with self._changed:
                    self._ready.append(built)
                    self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()
