"""The observer interface: what happens while a run is planned, trains and ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from dstrain.api.outcome import RunResult
    from dstrain.planning.plan import Plan


@dataclass(frozen=True)
class Step:
    """One line of ``metrics.jsonl``.

    Attributes:
        step: counted from 1.
        loss: mean over all label tokens of the step's global batch.
        lr: the learning rate of the step.
        grad_norm: of the whole model, before clipping; None where fp16's loss scale skipped the step.
        tokens: trained on since the run began.
        seconds: that the step took.
        metrics: the whole line, for what has no attribute here.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float | None
    tokens: int
    seconds: float
    metrics: Mapping[str, Any] = field(default_factory=dict)


class Events(Protocol):
    """An observer of a run. Subclass it and override what you want to know; the methods here do nothing.

    All methods are called in the thread that called the API function. What they raise ends the run, and is passed on.
    """

    def planned(self, plan: Plan) -> None:
        """The plan is made; nothing has been started."""
        return None

    def started(self, folder: Path, command: str) -> None:
        """The ranks are being started, by this shell command. Again after each automatic restart."""
        return None

    def step(self, step: Step) -> None:
        """A step has been trained."""
        return None

    def validated(self, step: int, loss: float, losses: Mapping[str, float]) -> None:
        """A validation loss was taken after ``step``; 0: before training.

        Args:
            loss: of several validation sets the mean over their label tokens.
            losses: of each of several validation sets, by name; empty for a single one.
        """
        return None

    def saved(self, step: int, path: Path) -> None:
        """The checkpoint of ``step`` is complete, in this folder."""
        return None

    def note(self, text: str, topic: str = "note") -> None:
        """Something worth knowing: ``topic`` is ``note``, ``resume``, ``restart``, ``progress``, ... in one word."""
        return None

    def ended(self, result: RunResult) -> None:
        """All processes of the run have ended, in order."""
        return None


class _Silent(Events):
    """Observes nothing."""


SILENT: Events = _Silent()


def progress_to(events: Events) -> Callable[[str], None]:
    """What takes lines of progress, and passes them on as notes."""
    return lambda text: events.note(text, "progress")
