"""Train the same steps in one process and in two stages x two replicas, and print the losses side by side."""

from __future__ import annotations

import sys

import dstrain


class Losses(dstrain.Events):
    """Collects what the run tells."""

    def __init__(self) -> None:
        self.by_step: dict[int, float] = {}

    def step(self, step: dstrain.Step) -> None:
        self.by_step[step.step] = step.loss


def train(name: str, steps: int, **layout: int) -> dict[int, float]:
    """The loss of each step, trained in this layout."""
    choices = {"name": name, "steps": steps, "sample_tokens": 0, "save_every": "never", **layout}
    config = dstrain.load_config(recipe="quickstart", flags=choices)
    losses = Losses()
    dstrain.run(config, events=losses)
    return losses.by_step


def main(steps: int = 10) -> float:
    """Print the table; the largest relative difference."""
    one = train("one-process", steps, zero=0, data_parallel=1)
    four = train("two-stages-two-replicas", steps, zero=2, pipeline=2, data_parallel=2)
    print("step  one process  2 x 2 ranks")
    for step, loss in one.items():
        print(f"{step:4}  {loss:11.7f}  {four[step]:11.7f}")
    largest = max(abs(four[step] - loss) / loss for step, loss in one.items())
    print(f"largest relative difference: {largest:.1e}")
    return largest


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
