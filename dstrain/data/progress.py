"""Progress lines on stderr for work that takes long."""

from __future__ import annotations

import sys
import time

_QUIET_SECONDS = 2.0
_EVERY_SECONDS = 5.0


class Progress:
    """Says how far some work has come: nothing in the first 2 seconds, then a line every 5.

    Args:
        doing: what is being done, as the line begins.
        total: how much there is to do, in `unit`; 0: not known.
        unit: printed behind the numbers; ``bytes`` are shown in MB.
        begin: how much of it was done before.
    """

    def __init__(self, doing: str, total: int, unit: str, begin: int = 0) -> None:
        self._doing = doing
        self._total = total
        self._unit = unit
        self._begin = begin
        self._start = time.monotonic()
        self._next = self._start + _QUIET_SECONDS

    def update(self, done: int) -> None:
        """Say it if it is time to; `done` counts from the beginning."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + _EVERY_SECONDS
        rate = (done - self._begin) / (now - self._start)
        speed = f", {self._amount(rate)}/s" if rate > 0 and self._unit == "bytes" else ""
        left = f", about {(self._total - done) / rate:,.0f} s left" if rate > 0 and done < self._total else ""
        total = f" of {self._amount(self._total)}" if self._total else ""
        print(f"dstrain: {self._doing}: {self._amount(done)}{total}{speed}{left}", file=sys.stderr)

    def _amount(self, count: float) -> str:
        return f"{count / 1e6:,.1f} MB" if self._unit == "bytes" else f"{count:,} {self._unit}"
