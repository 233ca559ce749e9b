"""What is said between steps goes through the group that waits, in host memory, and never through the training's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dstrain.runs.run_folder import RunFolder
from tests.e2e.test_hooks import ARGUMENTS, Workshop, workshop

__all__ = ["workshop"]
pytestmark = pytest.mark.timeout(300)

LISTING = '''
import json
import sys

import torch
from torch import distributed

from dstrain.control_group import control_group
from dstrain.runs.run_folder import RunFolder

FUNCTIONS = (
    "all_reduce", "broadcast", "all_gather", "all_gather_into_tensor", "reduce", "reduce_scatter_tensor",
    "reduce_scatter", "gather", "scatter", "barrier", "monitored_barrier", "all_gather_object",
    "broadcast_object_list",
)


class Listing:
    """Writes down each collective of a rank: function, group, device, and which method of the engine it is in."""

    every_rank = True

    def __init__(self, stop_at=0):
        self.stop_at, self.seen, self.within = stop_at, set(), 0
        for name in FUNCTIONS:
            self.wrap(name)

    def wrap(self, name):
        original = getattr(distributed, name)

        def listed(*args, **kwargs):
            if not self.within:
                self.note(name, args, kwargs)
            self.within += 1
            try:
                return original(*args, **kwargs)
            finally:
                self.within -= 1

        setattr(distributed, name, listed)

    def note(self, name, args, kwargs):
        given = [*args, *kwargs.values()]
        group = next((one for one in given if isinstance(one, distributed.ProcessGroup)), distributed.group.WORLD)
        groups = {id(distributed.group.WORLD): "default", id(control_group()): "control"}
        devices = {str(one.device) for one in given if isinstance(one, torch.Tensor)}
        frame, within = sys._getframe(2), "nothing"
        while frame is not None:
            file, function = frame.f_code.co_filename, frame.f_code.co_name
            if file.endswith(("dstrain/engine/rank_engines.py", "dstrain/engine/build.py")):
                within = function
            frame = frame.f_back
        self.seen.add((name, groups.get(id(group), "part"), ",".join(sorted(devices)), within))

    def on_start(self, info):
        self.folder, self.rank = info.folder, info.rank

    def on_step(self, info):
        if info.step == self.stop_at and self.rank == 0:
            RunFolder(self.folder).stop_request.touch()

    def on_end(self, info):
        with open(f"{self.folder}/seen-{self.rank}-{info.step}.json", "w") as file:
            json.dump(sorted(self.seen), file)
'''

OF_THE_TRAINING = {
    *("build_engine", "train_batch", "eval_loss", "next_token_logits", "check_replicas", "weights", "load"),
}
"""Methods of the engine whose collectives are the training's own. What loading sends, it sends when all have read."""


@pytest.fixture(scope="module", params=["3", "1"])
def seen(workshop: Workshop, request: pytest.FixtureRequest) -> list[list[Any]]:
    """The collectives of both ranks in a run that validates, saves, leaves, goes on, ends and writes its weights."""
    (workshop.place / "configs" / "listing.py").write_text(LISTING)
    zero = request.param
    hooks = [{"name": "listing:Listing", "options": {"stop_at": 3}}]
    config = workshop.config(hooks=hooks, save_weights=True, check_every=1, communication_timeout="5m")
    layout = ["--zero", zero, "--set", "save_every=1s"]
    layout += ["--pipeline", "1", "--data-parallel", "2"] if zero == "3" else []
    name = f"listed-{zero}"
    said = workshop.run("run", "--verbose", "--config", config, *ARGUMENTS, *layout, "--name", name)
    folder = workshop.folder(name)
    assert "communication_timeout" in said.out and "5m" in said.out
    left = collectives(folder, 3)
    said = workshop.run("resume", str(folder.path))
    assert said.code == 0, said.out + said.err
    return left + collectives(folder, 6)


def collectives(folder: RunFolder, step: int) -> list[list[Any]]:
    return [
        each
        for rank in range(2)
        for each in json.loads(Path(folder.path, f"seen-{rank}-{step}.json").read_text())
    ]


def test_no_word_between_steps_waits_in_a_group_of_the_training(seen: list[list[Any]]) -> None:
    assert not [each for each in seen if each[1] != "control" and each[3] not in OF_THE_TRAINING]
    assert {each[2] for each in seen if each[1] == "control"} <= {"cpu", ""}
    said = {(name, within) for name, group, _, within in seen if group == "control"}
    assert {("all_reduce", "nothing"), ("broadcast", "nothing"), ("all_gather", "nothing")} <= said
    assert {("barrier", "nothing"), ("barrier", "save"), ("barrier", "load")} <= said
    trained = {within for _, group, _, within in seen if group != "control"}
    assert {"train_batch", "eval_loss"} <= trained, "the training's own are seen too"
