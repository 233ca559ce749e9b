"""Whether a failed run is restarted, and how long to wait before."""

from __future__ import annotations

from dataclasses import dataclass

_FIRST_SECONDS, _MOST_SECONDS = 5.0, 300.0


@dataclass(frozen=True)
class Again:
    """Start again after ``seconds``; ``number`` of ``most`` restarts."""

    number: int
    most: int
    seconds: float


@dataclass(frozen=True)
class GiveUp:
    """Do not, and why. ``reason`` is empty where no restart was asked for."""

    reason: str


class Restarts:
    """Asked after each failure.

    The wait doubles from restart to restart, and is reset by progress: a machine that comes back needs
    time, and a run that fails now and then over weeks should not wait longer each time. The number of restarts is
    that of those in a row without a new checkpoint.

    Args:
        most: how many in a row.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._in_a_row = 0
        self._saved: int | None = None
        self._failed_at: int | None = None

    def after_failure(self, *, step: int, saved: int) -> Again | GiveUp:
        """What to do now.

        Args:
            step: the last step that was trained; 0 where the launch that failed has trained none.
            saved: the step of the newest complete checkpoint; 0 where there is none.
        """
        if not self._most:
            return GiveUp("")
        progress = self._saved is not None and saved > self._saved
        if progress:
            self._in_a_row = 0
        elif self._in_a_row and step == self._failed_at:
            where = f"after step {step}" if step else "before the first step"
            return GiveUp(f"it failed again {where}, and no checkpoint was made in between")
        self._saved, self._failed_at = saved, step
        if self._in_a_row == self._most:
            return GiveUp(f"it was restarted {self._most} times without a new checkpoint")
        self._in_a_row += 1
        seconds = min(_FIRST_SECONDS * 2 ** (self._in_a_row - 1), _MOST_SECONDS)
        return Again(self._in_a_row, self._most, seconds)
