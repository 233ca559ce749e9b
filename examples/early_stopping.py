"""A hook: ask the run to save and stop once the validation loss has not fallen for some evaluations."""

from __future__ import annotations

from pathlib import Path

from dstrain.train.hooks import StartInfo, ValidationInfo


class EarlyStopping:
    """Leaves the file ``stop`` in the run folder: after the current step the run saves and ends with exit code 75."""

    def __init__(self, patience: int = 3, min_delta: float = 0.0) -> None:
        self.patience, self.min_delta = patience, min_delta
        self.best, self.since = float("inf"), 0

    def on_start(self, info: StartInfo) -> None:
        self.stop_request = Path(info.folder) / "stop"

    def on_validation(self, info: ValidationInfo) -> None:
        loss = info.losses["validation_loss"]
        if loss < self.best - self.min_delta:
            self.best, self.since = loss, 0
            return
        self.since += 1
        if self.since >= self.patience:
            print(f"no improvement since {self.since} evaluations: stopping", flush=True)
            self.stop_request.touch()
