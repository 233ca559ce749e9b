"""What trackers cost a step: ``python benchmarks/trackers.py [--step-seconds 0.1]``.

The training's thread only calls `on_step`; what the libraries do goes on in other threads of the same interpreter,
which they take from it as far as they compute. Both are measured, over steps that do nothing but wait. W&B is offline,
MLflow writes into its database: with servers, their threads wait more and compute no more.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

from dstrain.hooks.mlflow_tracker import MlflowTracker
from dstrain.hooks.tensorboard_tracker import TensorBoardTracker
from dstrain.hooks.trackers import Tracker
from dstrain.hooks.wandb_tracker import WandbTracker
from dstrain.train.hooks import EndInfo, StartInfo, StepInfo

METRICS = {"loss": 2.5, "lr": 3e-4, "grad_norm": 0.7, "tokens": 10**9, "seconds": 0.5, "memory": 80 * 10**9}


def cost(made_by: type[Tracker] | None, steps: int, step_seconds: float) -> tuple[float, float]:
    """Seconds a step that the call takes, and that all threads compute."""
    with tempfile.TemporaryDirectory() as folder:
        tracker = made_by() if made_by else None
        if tracker:
            tracker.on_start(StartInfo("benchmark", folder, os.urandom(8).hex(), {}, {}, {}, 1, 0, 1))
            tracker.on_step(StepInfo(0, {"step": 0}))
            while not (Path(folder) / "trackers").exists():  # it begins once a run, and not once a step
                time.sleep(0.1)
        computed, called = time.process_time(), 0.0
        for step in range(1, steps + 1):
            time.sleep(step_seconds)
            began = time.perf_counter()
            if tracker:
                tracker.on_step(StepInfo(step, {"step": step, **METRICS}))
            called += time.perf_counter() - began
        computed = time.process_time() - computed
        if tracker:
            tracker.on_end(EndInfo(steps, True, {}))
            tracker.wait(60)
    return called / steps, computed / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--step-seconds", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()
    os.environ["WANDB_MODE"] = "offline"
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    os.chdir(Path(tempfile.gettempdir()))
    _, idle = cost(None, arguments.steps, arguments.step_seconds)
    print(
        f"steps of {arguments.step_seconds * 1e3:g} ms; without a tracker {idle * 1e6:.0f} us of it computed"
    )
    for made_by in (TensorBoardTracker, WandbTracker, MlflowTracker):
        called, computed = cost(made_by, arguments.steps, arguments.step_seconds)
        share = (computed - idle) / arguments.step_seconds
        print(
            f"{made_by.name:12} call {called * 1e6:5.1f} us   computed {(computed - idle) * 1e6:5.0f} us   {share:.2%}"
        )


if __name__ == "__main__":
    main()
