"""Learning-rate schedules as a user may write them, outside of dstrain."""

from __future__ import annotations

from typing import Any


def wsd(step: int, steps: int, decay: float = 0.2, last: int = 0) -> float:
    """Warmup-stable-decay: constant, then linear over the last share (Hägele et al. 2024, arXiv 2405.18392).

    ``last``: where it ends, for a run that is trained in parts.
    """
    last = last or steps
    return min(1.0, (last - step + 1) / (decay * last))


def whole(step: int, steps: int) -> int:
    """An integer is a number too."""
    return 1


def negative(step: int, steps: int) -> float:
    """It goes below 0 at its end."""
    return 0.5 - step / steps


def not_finite(step: int, steps: int) -> float:
    """It has no value at its last step."""
    return float("nan") if step == steps else 1.0


def text(step: int, steps: int) -> Any:
    """No number."""
    return "1.0"


def truth(step: int, steps: int) -> Any:
    """A bool is no factor."""
    return step < steps


def enormous(step: int, steps: int) -> int:
    """No float holds it."""
    return 10**400


def ends(step: int, steps: int) -> float:
    """It ends the process."""
    raise SystemExit(3)


def divides(step: int, steps: int) -> float:
    """It fails at its last step."""
    return 1 / (steps - step)


_rate = [1.0]


def decays(step: int, steps: int) -> float:
    """It remembers the step before."""
    _rate[0] *= 0.9
    return _rate[0]
