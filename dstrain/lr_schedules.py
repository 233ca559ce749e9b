"""Every learning-rate schedule that dstrain knows by name, in one table: its function, and the config keys it takes.

A new one is an entry in `LR_SCHEDULES`. The config's choices, its JSON Schema and the ranks ask this table.

A schedule is a pure function ``schedule(step, steps, **options) -> float``. ``step`` counts from 1 to ``steps``, both
without the warm-up, which is the same for all. What it returns is multiplied with ``lr``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class LrSchedule:
    """A built-in schedule.

    Attributes:
        factor: the function.
        takes: the config keys that are its options.
    """

    factor: Callable[..., float]
    takes: tuple[str, ...] = ()


def _cosine(step: int, steps: int, *, lr_final: float) -> float:
    """Half a wave of the cosine from 1 to ``lr_final``."""
    return lr_final + (1 - lr_final) * (0.5 * (1 + math.cos(math.pi * (step / steps))))


def _linear(step: int, steps: int, *, lr_final: float) -> float:
    """A line from 1 to ``lr_final``."""
    return lr_final + (1 - lr_final) * (1 - step / steps)


def _constant(step: int, steps: int) -> float:
    return 1.0


LR_SCHEDULES: dict[str, LrSchedule] = {
    "cosine": LrSchedule(_cosine, takes=("lr_final",)),
    "linear": LrSchedule(_linear, takes=("lr_final",)),
    "constant": LrSchedule(_constant),
}


def schedule_keys() -> tuple[str, ...]:
    """The config keys that some built-in schedule takes beside ``lr`` and ``warmup_steps``, each once."""
    return tuple(dict.fromkeys(key for schedule in LR_SCHEDULES.values() for key in schedule.takes))
