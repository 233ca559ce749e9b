"""The learning rate of a step: a pure function of the step. A schedule of the user's own is tried before the first."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any

from dstrain.config.schema import RunConfig
from dstrain.errors import DstrainError
from dstrain.lr_schedules import LR_SCHEDULES
from dstrain.plugins import is_code, load_plugin

_MOST_TRIED = 10_000
"""Steps at which a schedule is tried before the first one; of more, so many at equal distances."""


@dataclass(frozen=True)
class LearningRate:
    """Linear warm-up to ``peak``, then ``peak`` times what the schedule says.

    Attributes:
        factor: of a step and the number of steps, both without the warm-up.
    """

    peak: float
    warmup_steps: int
    steps: int
    factor: Callable[[int, int], float]

    @classmethod
    def of(cls, config: RunConfig) -> LearningRate:
        """The learning rate that a config asks for.

        Raises:
            DstrainError: the user's own schedule can't be loaded, fails at some step, returns something else than
                finite numbers from 0 on, or is not a pure function.
        """
        factor: Callable[[int, int], float]
        if is_code(config.lr_schedule):
            function = load_plugin(config.lr_schedule, config.code_dirs or (), what="learning-rate schedule")
            factor = own = OwnSchedule(config.lr_schedule, function, config.lr_schedule_options)
            own.try_all(config.steps - config.warmup_steps)
        else:
            built_in = LR_SCHEDULES[config.lr_schedule]
            factor = partial(built_in.factor, **{key: getattr(config, key) for key in built_in.takes})
        return cls(config.lr, config.warmup_steps, config.steps, factor)

    def __call__(self, step: int) -> float:
        """The learning rate of ``step``, counted from 1. Raises DstrainError as `OwnSchedule` does."""
        if step <= self.warmup_steps:
            return self.peak * step / self.warmup_steps
        return self.peak * self.factor(step - self.warmup_steps, self.steps - self.warmup_steps)


@dataclass(frozen=True)
class OwnSchedule:
    """A schedule of the user's own, whose every value is checked.

    Attributes:
        name: ``module:name``, for messages.
        function: takes a step from 1 on, the number of steps, and ``options``; returns a factor of ``lr``.
        options: keyword arguments, JSON values.
    """

    name: str
    function: Callable[..., Any]
    options: dict[str, Any]

    def __call__(self, step: int, steps: int) -> float:
        """The factor of a step. Raises DstrainError: it fails, or is not a finite number from 0 on."""
        try:
            value = self.function(step, steps, **self.options)
            factor = float(value) if isinstance(value, Real) else math.nan
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            raise self._error(
                f"failed at step {step} of {steps}: {type(error).__name__}: {error}",
                "it is called with step, steps, and what lr_schedule_options holds",
            ) from error
        if isinstance(value, bool) or not isinstance(value, Real):
            raise self._error(
                f"returned a {type(value).__name__} at step {step} of {steps}, not a number",
                "return a float: the factor of lr",
            )
        if not math.isfinite(factor) or factor < 0:
            raise self._error(
                f"returned {factor:g} at step {step} of {steps}",
                "return a finite number, 0 or more: the factor of lr",
            )
        return factor

    def try_all(self, steps: int) -> None:
        """Try every step, or many of them, in order and again backwards.

        Raises:
            DstrainError: as for a call; or a step has another value the second time.
        """
        if steps < 1:  # the warm-up is all there is
            return
        tried = sorted({1 + (steps - 1) * i // (_MOST_TRIED - 1) for i in range(_MOST_TRIED)})
        if steps <= _MOST_TRIED:
            tried = list(range(1, steps + 1))
        values = {step: self(step, steps) for step in tried}
        for step in reversed(tried):
            again = self(step, steps)
            if again != values[step]:
                raise self._error(
                    f"is not a pure function: step {step} of {steps} has {values[step]:g}, and {again:g} when it"
                    " is asked again",
                    "compute the factor from step, steps and options alone: a resumed run starts in the middle",
                )

    def _error(self, message: str, hint: str) -> DstrainError:
        return DstrainError(f"learning-rate schedule {self.name} {message}", hint=hint, exit_code=1)
