"""The learning rate of a step: a pure function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dstrain.config.schema import RunConfig


@dataclass(frozen=True)
class LearningRate:
    """Linear warm-up to ``peak``, then cosine, linear, or constant down to ``peak x final``."""

    peak: float
    warmup_steps: int
    steps: int
    shape: str
    final: float

    @classmethod
    def of(cls, config: RunConfig) -> LearningRate:
        return cls(config.lr, config.warmup_steps, config.steps, config.lr_schedule, config.lr_final)

    def __call__(self, step: int) -> float:
        """The learning rate of ``step``, counted from 1."""
        if step <= self.warmup_steps:
            return self.peak * step / self.warmup_steps
        if self.shape == "constant":
            return self.peak
        done = min(1.0, (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps))
        left = 0.5 * (1 + math.cos(math.pi * done)) if self.shape == "cosine" else 1 - done
        return self.peak * (self.final + (1 - self.final) * left)
