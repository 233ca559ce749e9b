"""The signals that ask a command to end: which of them are heeded, and what they raise."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)
"""What batch systems send before a job's time is over: Slurm as told (``--signal=USR1@300``), LSF, Grid Engine
(``-notify``)."""
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, *WARNINGS)
"""They let a training end its step and save."""
AT_ONCE = signal.SIGQUIT
"""Ctrl-\\: nothing is saved, but nothing is left behind either."""
_Handler = Callable[[int, FrameType | None], None]
# What is undone takes less. After it a signal counts again: an exception in a destructor is lost.
_UNWINDING_SECONDS = 5.0


class StoppedError(SystemExit):
    """A signal other than SIGINT asks the command to end. ``number``: which one."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


def heeded(numbers: Iterable[signal.Signals] = STOPS) -> list[signal.Signals]:
    """Those that the caller has not ignored: ``nohup`` ignores SIGHUP, and a script SIGINT for its background jobs."""
    return [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]


@contextmanager
def handled(handler: _Handler, numbers: Iterable[signal.Signals] = STOPS) -> Iterator[None]:
    """Handle those signals that the caller has not ignored; in another thread than the main one, none of them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in heeded(numbers)}
    try:
        yield
    finally:
        for number, earlier in before.items():
            # None: set by a library that is not Python's
            signal.signal(number, signal.SIG_DFL if earlier is None else earlier)


@contextmanager
def raised() -> Iterator[None]:
    """A signal raises KeyboardInterrupt or `StoppedError`, so that nothing is left behind; a terminal that is closed
    sends more than one, and those that follow do not disturb what is being undone."""
    first = float("-inf")

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if time.monotonic() < first + _UNWINDING_SECONDS:
            return
        first = time.monotonic()
        raise KeyboardInterrupt if number == signal.SIGINT else StoppedError(number)

    with handled(stop, (*STOPS, AT_ONCE)):
        yield
