"""When and whom to kill: drawn from a seeded generator, so that every part of a run and of a save gets its turn."""

from __future__ import annotations

import random
from dataclasses import dataclass

from tests.support.torture.attempt import ALL, COMMAND, GUARD, LAUNCHER, RANK

START, STEP = "start", "step"
SAVE = ("aside", "files", "manifest", "named", "removing")
"""How far a save has come (`attempt.marks`)."""
VICTIMS = (RANK, RANK, ALL, LAUNCHER, COMMAND, GUARD)
# Kills after which no rank lives to complete what it was doing.
_FINAL = (RANK, ALL)


@dataclass(frozen=True)
class Moment:
    """``delay`` seconds after ``sign``, which is START, STEP (``steps`` steps were computed) or one of SAVE."""

    sign: str
    victim: str
    delay: float
    steps: int = 0

    @property
    def in_a_save(self) -> bool:
        return self.sign in SAVE

    def __str__(self) -> str:
        after = f"{self.steps} steps" if self.sign == STEP else self.sign
        return f"kill {self.victim} {self.delay:.3f} s after {after}"


class Moments:
    """The moments of one run's kills: every other one in a save, and every fourth one, the first with them, in a save
    that nobody is left to complete. Of the others, each victim as often as its place in VICTIMS."""

    def __init__(self, seed: str, *, save_every: int) -> None:
        self._draws = random.Random(seed)
        self._save_every = save_every
        self._number = 0
        self._victims: list[str] = []
        self._saves: list[str] = []

    def draw(self, remaining: int) -> Moment:
        """The next one.

        Args:
            remaining: steps that the run still has. Near its end kills are chosen that let it gain little.
        """
        self._number += 1
        near_the_end = remaining <= 2 * self._save_every
        final = near_the_end or self._number % 4 == 1
        victim = self._draws.choice(_FINAL) if final else self._dealt(self._victims, VICTIMS)
        if remaining == 0:
            return Moment(START, victim, self._draws.uniform(0, 0.4))
        if self._number % 2:
            sign = self._draws.choice(SAVE[:2]) if final else self._dealt(self._saves, SAVE)
            return Moment(sign, victim, self._draws.uniform(0, 0.05))
        if remaining == 1 or self._draws.random() < 0.2:
            return Moment(START, victim, self._draws.uniform(0, 0.4))
        steps = self._draws.randint(1, min(self._save_every + 1, remaining - 1))
        return Moment(STEP, victim, self._draws.uniform(0, 0.08), steps)

    def _dealt(self, deck: list[str], cards: tuple[str, ...]) -> str:
        if not deck:
            deck.extend(self._draws.sample(cards, len(cards)))
        return deck.pop()
