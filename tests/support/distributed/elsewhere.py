"""A training that is saved in one layout and goes on in another: what the ranks do, and what is compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from tests.support.distributed import training
from tests.support.distributed.compare import assert_within, difference
from tests.support.distributed.training import Case, Outcome
from tests.support.distributed.workers import run
from tests.support.distributed.yardsticks import train_in_plain_loop

SAVED_AT = 4
FP32 = Case(steps=9)

Layout = dict[str, Any]

ONE: Layout = {"zero": 0}
ZERO1_2X2: Layout = {"zero": 1, "pipeline": 2, "data_parallel": 2}
ZERO1_PP2: Layout = {"zero": 1, "pipeline": 2}
ZERO2_DP2: Layout = {"zero": 2, "data_parallel": 2}
ZERO3_DP2: Layout = {"zero": 3, "data_parallel": 2}

# What a test may change in a rank before its engine is built.
Change = Callable[[], None]


def nothing() -> None:
    pass


def train_and_save(rank: int, case: Case, folder: str, change: Change = nothing) -> Outcome:
    change()
    return in_layout_with_buffers(rank, case, 1.5, save_to=folder)


def go_on(
    rank: int,
    case: Case,
    start_from: str,
    at_once: str,
    save_to: str | None = None,
    change: Change = nothing,
) -> Outcome:
    """Train on in another layout than that of the checkpoint. What was loaded is saved again before a step is taken."""
    change()
    return in_layout_with_buffers(
        rank, case, 0.0, save_to=save_to, start_from=start_from, other_layout=True, at_once=at_once
    )


def resume_alike(rank: int, case: Case, start_from: str) -> Outcome:
    """Train on in the layout that the checkpoint was saved in."""
    return in_layout_with_buffers(rank, case, 0.0, start_from=start_from)


def in_layout_with_buffers(
    rank: int, case: Case, value: float, at_once: str | None = None, **options: Any
) -> Outcome:
    """`train_in_layout` with a model whose layers have persistent buffers, of ``value`` + the layer's number.

    A layer has one of its own, and one in a part that has no weights.
    """
    build = training.build_case_engine

    def build_and_change(case: Case) -> Any:
        engine, plan = build(case)
        for name, layer in engine.engine.module.named_children():
            if name.isdigit():
                layer.register_buffer(f"mark_{name}", torch.full((2,), value + int(name)))
                layer.weightless = torch.nn.Module()
                layer.weightless.register_buffer(f"mark_{name}", torch.full((2,), value + int(name)))
        load = engine.load

        def load_and_save(folder: Path, **how: Any) -> dict[str, Any]:
            state = load(folder, **how)
            if at_once:
                Path(at_once).mkdir(parents=True, exist_ok=True)
                engine.save(Path(at_once), state)
            return state

        engine.load = load_and_save
        return engine, plan

    training.build_case_engine = build_and_change
    return training.train_in_layout(rank, case, **options)


class Trained:
    """Each A is trained once: its checkpoint after `SAVED_AT` steps."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[tuple[Case, Change], Path] = {}

    def __call__(self, case: Case, change: Change = nothing) -> Path:
        short = replace(case, steps=SAVED_AT)
        if (short, change) not in self._made:
            path = self._folder / f"{len(self._made)}"
            run(case.world_size, train_and_save, short, str(path), change)
            self._made[short, change] = path
        return self._made[short, change]


@cache
def unbroken(plain: Case) -> Outcome:
    """The plain loop in one process, from the first step to the last."""
    [outcome] = run(1, train_in_plain_loop, plain)
    return outcome


def assert_goes_on(case: Case, ranks: list[Outcome], plain: Case) -> None:
    """The steps are those of the plain loop that was never broken, within the bounds of `compare`."""
    whole = unbroken(plain)
    rest = replace(whole, losses=whole.losses[SAVED_AT:], norms=whole.norms[SAVED_AT:])
    assert_within(case, difference(ranks, rest), plain)


def assert_same_state(saved: Path, again: Path, case: Case, *, layers: int | None = None) -> None:
    """Both checkpoints hold the same to the bit, whatever their layouts; ``layers``: how many have buffers."""
    from dstrain.engine.checkpoint_state import MASTER, SavedState

    a, b = SavedState(saved), SavedState(again)
    assert a.parameters.keys() == b.parameters.keys() and a.parameters
    for name, one in a.parameters.items():
        other = b.parameters[name]
        assert torch.equal(one.weight.read(), other.weight.read()), name
        assert torch.equal(one.most_precise.read(), other.most_precise.read()), name
        assert one.states.keys() - {MASTER} == other.states.keys() - {MASTER}, name
        for key in one.states.keys() - {MASTER}:
            assert torch.equal(one.states[key].read(), other.states[key].read()), (name, key)
            assert one.states[key].read().any(), "nothing was trained that could be lost"
        assert one.values == other.values, name
    assert a.counters == b.counters and a.counters["global_steps"] == SAVED_AT
    layers = case.layers + 2 if layers is None else layers
    assert len(a.buffers) == 2 * layers and a.buffers.keys() == b.buffers.keys()
    for name, buffer in a.buffers.items():
        number = float(name.rpartition("mark_")[2])
        assert buffer.read().tolist() == b.buffers[name].read().tolist() == [1.5 + number] * 2
    if case.precision == "fp16":
        assert vars(a.loss_scaler) == vars(b.loss_scaler)
    assert a.ours["step"] == b.ours["step"] == SAVED_AT
