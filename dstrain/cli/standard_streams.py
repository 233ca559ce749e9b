"""Standard output and standard error that end no command: what they can't take is dropped.

A reader goes away, a disk is full, a terminal is closed: a training that is well goes on, and a stop is still heard.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

# A pipe that can be written to takes as much without blocking (PIPE_BUF).
_BLOCK = 4096


class _Descriptor(io.FileIO):
    """A descriptor that takes everything: after its first error it drops what comes.

    Attributes:
        failure: that error.
        patience: seconds that a reader who stands still (``| less``, Ctrl-S) is waited for; None: for ever.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number, "w", closefd=False)
        self.failure: OSError | None = None
        self.patience: float | None = None
        self._stalled = False

    def write(self, data: Any, /) -> int:
        if self.failure is not None:
            return len(data)
        try:
            if not self._can_take():
                return len(data)
            return super().write(data[:_BLOCK]) or 0
        except OSError as error:
            self.failure = error
            return len(data)

    def _can_take(self) -> bool:
        """Whether a block can be written now or soon. It may be non-blocking: terminals are shared."""
        poll = select.poll()
        poll.register(self.fileno(), select.POLLOUT)
        wait = 0.0 if self._stalled and self.patience is not None else self.patience
        ready = bool(poll.poll(None if wait is None else wait * 1000))
        self._stalled = not ready
        return ready


class StandardStreams:
    """What became of a command's output."""

    def __init__(self, output: _Descriptor | None) -> None:
        self._output = output

    @property
    def lost_output(self) -> str | None:
        """Why not all of standard output was written; None where it was, or its reader wanted no more."""
        failure = self._output.failure if self._output else None
        if failure is None or failure.errno == errno.EPIPE:
            return None
        return failure.strerror or str(failure)


@contextmanager
def standard_streams() -> Iterator[StandardStreams]:
    """Replace the standard streams for a while. One without a descriptor stays as it is."""
    for number in (0, 1, 2):
        _open_if_closed(number)
    before = sys.stdout, sys.stderr
    output, error = _replacement(sys.stdout), _replacement(sys.stderr)
    sys.stdout, sys.stderr = (output or before[0]), (error or before[1])
    try:
        yield StandardStreams(_descriptor(output))
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                with suppress(OSError, ValueError):
                    stream.flush()
        sys.stdout, sys.stderr = before


def _open_if_closed(number: int) -> None:
    """Or the next file that is opened gets the number of a standard stream, and what is meant for that."""
    try:
        os.fstat(number)
    except OSError:
        with suppress(OSError):
            os.open(os.devnull, os.O_RDWR)  # the lowest free number


def _replacement(stream: TextIO | None) -> io.TextIOWrapper | None:
    """The same that drops what it can't take, and shows what its encoding has no letters for as escapes."""
    if stream is None:
        return None
    try:
        number = stream.fileno()
        stream.flush()
    except (OSError, ValueError):
        return None
    raw = _Descriptor(number)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=getattr(stream, "line_buffering", False),
        write_through=getattr(stream, "write_through", False),
    )


def wait_for_readers(seconds: float | None) -> None:
    """How long from now on a reader who stands still is waited for before what he does not take is dropped.

    None, as at the start: for ever. For the time in which somebody waits for what else this process does.
    """
    for stream in (sys.stdout, sys.stderr):
        raw = _descriptor(stream)
        if raw is not None:
            raw.patience = seconds


def _descriptor(stream: TextIO | None) -> _Descriptor | None:
    raw = getattr(getattr(stream, "buffer", None), "raw", None)
    return raw if isinstance(raw, _Descriptor) else None
