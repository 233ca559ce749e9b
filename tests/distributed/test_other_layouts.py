"""A training that goes on in another layout is the same training: from A's checkpoint, in B, equal to the unbroken run.

Two things are looked at for each pair. B's state, before it has trained a step, is A's to the bit: B saves at once, and
both checkpoints are read offline. And B's steps are those of a plain loop that was never broken, within the bounds of
`compare`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import training
from tests.distributed.compare import bound, difference, reference
from tests.distributed.training import Case, Outcome
from tests.distributed.workers import WorkerError, run
from tests.distributed.yardsticks import train_in_plain_loop

SAVED_AT = 4
FROZEN = ("model.layers.0.*", "model.layers.1.mlp.*")

FP32 = Case(steps=9)
UNTIED = replace(FP32, tied=False)
MOMENTUM = replace(FP32, optimizer="sgd", momentum=0.5)
PART = replace(FP32, freeze=FROZEN)
BF16 = Case(precision="bf16")  # as many steps as the bounds of 16 bits are known for
FP16 = Case(precision="fp16")
MIXTURE = replace(FP32, experts=4)

ONE = {"zero": 0}
ZERO1_2X2 = {"zero": 1, "pipeline": 2, "data_parallel": 2}
ZERO1_PP2 = {"zero": 1, "pipeline": 2}
ZERO2_DP4 = {"zero": 2, "data_parallel": 4, "accumulation": 2}
ZERO2_PP2 = {"zero": 2, "pipeline": 2}
ZERO3_DP2 = {"zero": 3, "data_parallel": 2}
ZERO3_2X2 = {"zero": 3, "pipeline": 2, "data_parallel": 2}
DUALPIPEV = {"zero": 2, "pipeline": 2, "schedule": "dualpipev"}
OFFLOADED = {"zero": 2, "data_parallel": 2, "offload": "cpu"}

PAIRS: list[tuple[Case, dict[str, Any], dict[str, Any]]] = [
    (FP32, ONE, ZERO1_2X2),
    (FP32, ONE, ZERO3_DP2),
    (FP32, ONE, {"zero": 0, "pipeline": 2}),
    (FP32, ONE, {"zero": 0, "data_parallel": 4}),
    (FP32, ZERO1_2X2, ONE),
    (FP32, ZERO1_2X2, {"zero": 1, "data_parallel": 4}),
    (FP32, ZERO1_2X2, {"zero": 1, "pipeline": 4}),
    (FP32, ZERO1_2X2, {"zero": 1, "pipeline": 2, "schedule": "dualpipev"}),
    (FP32, ZERO1_2X2, ZERO2_PP2),
    (FP32, ZERO1_2X2, ZERO3_2X2),
    (FP32, ZERO1_2X2, OFFLOADED),
    (FP32, ZERO2_DP4, ZERO3_DP2),
    (FP32, ZERO2_DP4, ZERO1_PP2),
    (FP32, ZERO3_DP2, ONE),
    (FP32, ZERO3_DP2, {"zero": 2, "data_parallel": 2}),
    (FP32, ZERO3_DP2, {"zero": 3, "data_parallel": 4, "accumulation": 2}),
    (FP32, ZERO3_DP2, ZERO2_PP2),
    (FP32, DUALPIPEV, {"zero": 0, "data_parallel": 2}),
    (FP32, DUALPIPEV, {"zero": 2, "pipeline": 4}),
    (FP32, OFFLOADED, {"zero": 1}),
    (FP32, OFFLOADED, {"zero": 3, "data_parallel": 2, "offload": "cpu"}),
    (UNTIED, ZERO3_2X2, {"zero": 1, "pipeline": 4}),
    (UNTIED, ZERO3_2X2, ONE),
    (MOMENTUM, ZERO1_2X2, ZERO3_DP2),
    (MOMENTUM, ZERO1_2X2, {"zero": 0, "pipeline": 2}),
    (PART, ZERO3_DP2, ZERO2_PP2),
    (PART, ZERO3_DP2, ONE),
    (PART, ZERO3_DP2, ZERO3_2X2),
    (BF16, ZERO1_PP2, ZERO3_DP2),
    (BF16, ZERO1_PP2, ZERO2_DP4),
    (BF16, ZERO3_DP2, {"zero": 1, "pipeline": 2, "schedule": "dualpipev"}),
    (FP16, ZERO1_PP2, ZERO3_DP2),
    (FP16, ZERO3_DP2, ZERO2_PP2),
    (MIXTURE, ZERO1_PP2, {"zero": 3, "data_parallel": 2, "accumulation": 2}),
]


def name_of(pair: tuple[Case, dict[str, Any], dict[str, Any]]) -> str:
    training_, *layouts = pair
    kind = str(training_).removeprefix("zero0-pp1-dp1-").removesuffix("-accum4")
    return f"{kind}: " + " to ".join("-".join(str(value) for value in layout.values()) for layout in layouts)


def train_and_save(rank: int, case: Case, folder: str) -> Outcome:
    return in_layout_with_buffers(rank, case, 1.5, save_to=folder)


def go_on(rank: int, case: Case, start_from: str, at_once: str, save_to: str | None = None) -> Outcome:
    """Train on in another layout than that of the checkpoint. What was loaded is saved again before a step is taken."""
    return in_layout_with_buffers(
        rank, case, 0.0, save_to=save_to, start_from=start_from, other_layout=True, at_once=at_once
    )


def in_layout_with_buffers(
    rank: int, case: Case, value: float, at_once: str | None = None, **options: Any
) -> Outcome:
    """`train_in_layout` with a model whose layers have a persistent buffer each, of ``value`` + the layer's number."""
    build = training.build_case_engine

    def build_and_change(case: Case) -> Any:
        engine, plan = build(case)
        for name, layer in engine.engine.module.named_children():
            if name.isdigit():
                layer.register_buffer(f"mark_{name}", torch.full((2,), value + int(name)))
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
        self._made: dict[Case, Path] = {}

    def __call__(self, case: Case) -> Path:
        short = replace(case, steps=SAVED_AT)
        if short not in self._made:
            path = self._folder / f"{len(self._made)}"
            run(case.world_size, train_and_save, short, str(path))
            self._made[short] = path
        return self._made[short]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("trained"))


@cache
def unbroken(plain: Case) -> Outcome:
    """The plain loop in one process, from the first step to the last."""
    [outcome] = run(1, train_in_plain_loop, plain)
    return outcome


def assert_goes_on(case: Case, ranks: list[Outcome], plain: Case) -> None:
    whole = unbroken(plain)
    rest = replace(whole, losses=whole.losses[SAVED_AT:], norms=whole.norms[SAVED_AT:])
    allowed = bound(replace(plain, loss_scale_power=Case().loss_scale_power))
    found = difference(ranks, rest)
    assert found.within(allowed), f"{case}: {found} is not within {allowed}"


def assert_same_state(saved: Path, again: Path, case: Case) -> None:
    """To the bit, whatever the layouts of the two are."""
    from dstrain.engine.saved_state import MASTER, SavedState

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
        assert one.step == other.step, name
    assert a.counters == b.counters and a.counters["global_steps"] == SAVED_AT
    assert len(a.buffers) == case.layers + 2 and a.buffers.keys() == b.buffers.keys()
    for name, buffer in a.buffers.items():
        number = float(name.removeprefix("mark_"))
        assert buffer.read().tolist() == b.buffers[name].read().tolist() == [1.5 + number] * 2
    if case.precision == "fp16":
        assert vars(a.loss_scaler) == vars(b.loss_scaler)
    assert a.ours["step"] == b.ours["step"] == SAVED_AT


@pytest.mark.parametrize("pair", PAIRS, ids=name_of)
def test_the_training_goes_on(
    pair: tuple[Case, dict[str, Any], dict[str, Any]], trained: Trained, tmp_path: Path
) -> None:
    common, before, after = pair
    a, b = replace(common, **before), replace(common, **after)
    at_once = tmp_path / "at-once"
    ranks = run(b.world_size, go_on, b, str(trained(a)), str(at_once))
    assert_same_state(trained(a), at_once, b)
    assert_goes_on(b, ranks, a.in_one_process())


def test_the_pairs_are_many_and_differ() -> None:
    layouts = [(tuple(before.items()), tuple(after.items())) for _, before, after in PAIRS]
    assert len(PAIRS) >= 20 and all(before != after for before, after in layouts)
    zeros = {(before["zero"], after["zero"]) for _, before, after in PAIRS}
    assert zeros >= {(0, 1), (1, 0), (1, 2), (2, 1), (2, 3), (3, 2), (1, 3), (3, 1), (0, 3), (3, 0), (2, 0)}


def test_fp16_goes_on_with_the_loss_scale_that_was_found(trained: Trained, tmp_path: Path) -> None:
    """2^26 overflows at first. An engine that began anew would skip the same number of steps once more."""
    common = replace(FP16, loss_scale_power=26)
    a, b = replace(common, **ZERO1_PP2), replace(common, **ZERO3_DP2, accumulation=2)  # equal micro-batches
    ranks = run(b.world_size, go_on, b, str(trained(a)), str(tmp_path))
    skipped = [norm == float("inf") for norm in reference(a.in_one_process()).norms]
    assert any(skipped[:SAVED_AT]) and not skipped[-1]
    assert [norm == float("inf") for norm in ranks[0].norms] == skipped[SAVED_AT:]


@pytest.mark.parametrize("after", [ZERO1_2X2, ZERO3_DP2, {"zero": 0, "pipeline": 2}], ids=str)
def test_what_is_saved_after_the_change_is_resumed_as_ever(
    after: dict[str, Any], trained: Trained, tmp_path: Path
) -> None:
    """DeepSpeed's own loading finds all that it wants, to the bit."""
    start = trained(replace(FP32, zero=2, data_parallel=2))
    case = replace(FP32, **after)
    straight = run(case.world_size, go_on, case, str(start), str(tmp_path / "at-once"))
    short = replace(case, steps=SAVED_AT + 2)
    run(case.world_size, go_on, short, str(start), str(tmp_path / "at-once"), str(tmp_path / "saved"))
    rest = run(case.world_size, resume_alike, case, str(tmp_path / "saved"))
    for one, other in zip(straight, rest, strict=True):
        assert (one.losses[2:], one.norms[2:], one.held_out) == (other.losses, other.norms, other.held_out)
        assert all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights)


def resume_alike(rank: int, case: Case, start_from: str) -> Outcome:
    return in_layout_with_buffers(rank, case, 0.0, start_from=start_from)


def forgetful(rank: int, case: Case, start_from: str, at_once: str, lost: str) -> Outcome:
    """`go_on`, but something of the state is left behind."""
    from dstrain.engine import restore

    fill = restore._fill

    def fill_less(optimizer: Any, flat: Any, members: Any, shares: Any) -> None:
        fill(optimizer, flat, members, shares)
        if lost == "states":
            optimizer.state.pop(flat)
        else:
            optimizer.state[flat]["step"] = torch.tensor(1.0)

    restore._fill = fill_less
    return go_on(rank, case, start_from, at_once)


@pytest.mark.parametrize("lost", ["states", "step"])
def test_a_loss_of_state_would_be_seen(lost: str, trained: Trained, tmp_path: Path) -> None:
    a, b = replace(FP32, **ZERO1_2X2), replace(FP32, zero=2, data_parallel=2)
    ranks = run(b.world_size, forgetful, b, str(trained(a)), str(tmp_path), lost)
    with pytest.raises(AssertionError, match="is not within"):
        assert_goes_on(b, ranks, a.in_one_process())
    with pytest.raises(AssertionError):
        assert_same_state(trained(a), tmp_path, b)


def forget_names(state: dict[str, Any]) -> None:
    """As ZeRO-0 was saved before the names of its optimizer's states were kept."""
    del state["dstrain"]["parameter_names"]


def another_shape(state: dict[str, Any]) -> None:
    state["module"]["1.model.layers.0.mlp.up_proj.weight"] = torch.zeros(64, 31)


def another_name(state: dict[str, Any]) -> None:
    state["module"]["1.else"] = state["module"].pop("1.model.layers.0.mlp.up_proj.weight")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (forget_names, "does not tell the optimizer's exp_avg and exp_avg_sq of"),
        (another_shape, "up_proj.weight of [64, 32], and the checkpoint has one of [64, 31]"),
        (another_name, "up_proj.weight of [64, 32], and the checkpoint does not hold it"),
    ],
)
def test_what_the_checkpoint_lacks_is_refused(
    change: Callable[[dict[str, Any]], None], words: str, trained: Trained, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(trained(FP32), folder)
    path = folder / "state" / "mp_rank_00_model_states.pt"
    state = torch.load(path, weights_only=False)
    change(state)
    torch.save(state, path)
    with pytest.raises(WorkerError) as error:
        run(2, go_on, replace(FP32, data_parallel=2), str(folder), str(tmp_path / "at-once"))
    assert "DstrainError" in str(error.value) and words in str(error.value)


@pytest.mark.parametrize("layout", [ZERO1_2X2, ZERO3_DP2, {"zero": 2, "data_parallel": 2}], ids=str)
def test_a_part_is_a_slice_of_the_whole(layout: dict[str, Any], trained: Trained) -> None:
    from dstrain.engine.saved_state import SavedState

    case = replace(FP32, **layout)
    for parameter in SavedState(trained(case)).parameters.values():
        for tensor in (parameter.weight, *parameter.states.values()):
            whole = tensor.read().flatten()
            for start, stop in pairwise((0, 0, 1, 5, whole.numel() // 2, whole.numel() - 1, whole.numel())):
                assert torch.equal(tensor.part(start, stop - start), whole[start:stop])
