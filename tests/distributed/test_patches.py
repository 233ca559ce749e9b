"""Named cases: what stock DeepSpeed gets wrong or refuses, and what must hold beyond the matrix."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dstrain.errors import DstrainError
from dstrain.planning.model_shape import is_frozen
from tests.support.distributed.compare import assert_equal, reference
from tests.support.distributed.training import (
    Case,
    Outcome,
    build_case_engine,
    make_case_plan,
    train_in_layout,
)
from tests.support.distributed.workers import WorkerError, run
from tests.support.sampling import full, heavy


@pytest.mark.parametrize("zero", [1, 3, *full(2)])
def test_fp16_meets_and_survives_overflow(zero: int) -> None:
    """2^26 overflows fp16's gradients at first; the scale is halved until it does not."""
    case = Case(zero=zero, pipeline=2, precision="fp16", loss_scale_power=26)
    ranks = run(2, train_in_layout, case)
    skipped = [norm == float("inf") for norm in ranks[0].norms]
    assert skipped[0] and not skipped[-1]
    assert skipped == [norm == float("inf") for norm in reference(case.in_one_process()).norms]
    assert_equal(case, ranks)


@pytest.mark.parametrize(
    "case",
    [
        Case(zero=2, pipeline=2, data_parallel=2, checkpointing=True),
        Case(zero=3, data_parallel=2, checkpointing=True),
        Case(zero=2, pipeline=2, schedule="dualpipev", checkpointing=True),
        *full(
            Case(zero=1, pipeline=1, checkpointing=True),
            Case(zero=3, pipeline=2, data_parallel=2, checkpointing=True),
        ),
    ],
    ids=str,
)
def test_activation_checkpointing_keeps_every_gradient(case: Case) -> None:
    """The embedding's too: with DeepSpeed's default, the reentrant form, it would stay as it was."""
    ranks = run(case.world_size, train_in_layout, case)
    assert_equal(case, ranks)
    [before] = run(1, initial_weights, case)
    name = "model.embed_tokens.weight"
    after = next(rank.weights[name] for rank in ranks if name in rank.weights)
    assert (after - before[name]).abs().max() > 1e-4


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_stages_that_lack_a_parameter_group(zero: int) -> None:
    """Four stages of [embedding], [block], [block], [norm and head]: the first has no norms or biases.

    DeepSpeed's norm does one collective a group, and hangs when stages differ in their number.
    """
    case = Case(zero=zero, pipeline=4, layers=2, tied=False)
    assert make_case_plan(case).layout.cut == (0, 1, 2, 3, 4)
    assert_equal(case, run(4, train_in_layout, case))


FROZEN = ("model.layers.0.*", "model.layers.1.mlp.*")


@pytest.mark.parametrize(
    "case",
    [
        Case(zero=0, pipeline=2, data_parallel=2, freeze=FROZEN),
        Case(zero=2, pipeline=2, data_parallel=2, freeze=FROZEN),
        Case(zero=3, pipeline=1, data_parallel=2, freeze=FROZEN),
        Case(zero=2, pipeline=2, clip=0.1, steps=20, freeze=("model.embed_tokens.*",)),
        *full(
            Case(zero=0, pipeline=1, data_parallel=2, freeze=FROZEN),
            Case(zero=1, pipeline=1, data_parallel=2, freeze=FROZEN),
            Case(zero=1, pipeline=2, data_parallel=2, freeze=FROZEN),
            Case(zero=2, pipeline=1, data_parallel=2, freeze=FROZEN),
            Case(zero=3, pipeline=2, data_parallel=2, freeze=FROZEN),
        ),
    ],
    ids=str,
)
def test_frozen_parameters(case: Case) -> None:
    ranks = run(case.world_size, train_in_layout, case)
    assert_equal(case, ranks)
    [before] = run(1, initial_weights, case)
    for rank in ranks:
        for name, value in rank.weights.items():
            if is_frozen(name, case.freeze):
                assert torch.equal(value, before[name]), name


def test_a_tied_weight_frozen_by_one_name_is_frozen_on_every_stage() -> None:
    case = Case(pipeline=4, layers=2, freeze=("model.embed_tokens.*",))
    with pytest.raises(DstrainError, match="stage 0 would have only frozen parameters"):
        make_case_plan(case)
    with pytest.raises(DstrainError, match="stage 3 would have only frozen parameters"):
        make_case_plan(replace(case, freeze=("lm_head.*", "model.norm.*"), pipeline=4, layers=3))


def test_a_stage_with_only_frozen_parameters_is_refused() -> None:
    case = Case(pipeline=4, layers=2, tied=False, freeze=("model.layers.0.*",))
    with pytest.raises(DstrainError, match="stage 1 would have only frozen parameters"):
        make_case_plan(case)


def initial_weights(rank: int, case: Case) -> dict[str, torch.Tensor]:
    from dstrain.model.pipeline_model import PipelineModel
    from tests.support.distributed.training import model_config

    layers = PipelineModel(model_config(case), seed=7)
    found: dict[str, torch.Tensor] = {}
    for index in range(layers.num_layers):
        found |= {name: value.detach().clone() for name, value in layers.build(index).named_parameters()}
    return found


@pytest.mark.parametrize(
    "case",
    [
        Case(zero=2, pipeline=2, data_parallel=2),
        Case(zero=3, data_parallel=2),
        *full(
            Case(zero=3, data_parallel=4, accumulation=2),
            Case(zero=1, pipeline=4, precision="bf16"),
            Case(zero=1, pipeline=2, schedule="dualpipev"),
        ),
    ],
    ids=str,
)
def test_the_same_layout_twice_is_equal_to_the_bit(case: Case) -> None:
    case = replace(case, steps=6)
    first, second = (run(case.world_size, train_in_layout, case) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert (a.losses, a.norms, a.validation) == (b.losses, b.norms, b.validation)
        assert all(torch.equal(a.weights[name], b.weights[name]) for name in a.weights)


RESUMED = [
    Case(zero=2, pipeline=2, data_parallel=2, precision="bf16"),
    Case(zero=3, data_parallel=2),
    Case(zero=1, pipeline=2, precision="fp16", loss_scale_power=26),
    Case(zero=1, pipeline=2, schedule="dualpipev"),
    *heavy(Case(zero=2, pipeline=2, data_parallel=2, offload="cpu")),
    Case(zero=2, pipeline=2, freeze=FROZEN),
    *full(
        Case(zero=0, pipeline=2),
        Case(zero=1, pipeline=2, data_parallel=2),
        Case(zero=2, pipeline=4),
        Case(zero=3, pipeline=2, data_parallel=2),
        Case(zero=2, data_parallel=2, freeze=FROZEN),
    ),
]


@pytest.mark.parametrize("case", RESUMED, ids=str)
def test_saved_and_resumed_is_equal_to_the_bit(case: Case, tmp_path: Path) -> None:
    """9 steps at once, or 4, a checkpoint, and 5 in new processes."""
    case, saved_at = replace(case, steps=9), 4
    whole = run(case.world_size, train_in_layout, case)
    start = replace(case, steps=saved_at)
    run(case.world_size, train_in_layout, start, str(tmp_path / "saved"))
    rest = run(case.world_size, train_in_layout, case, None, str(tmp_path / "saved"))
    for a, b in zip(whole, rest, strict=True):
        assert (a.losses[saved_at:], a.norms[saved_at:], a.validation) == (b.losses, b.norms, b.validation)
        assert all(torch.equal(a.weights[name], b.weights[name]) for name in a.weights)


@pytest.mark.parametrize(
    ("zero", "tampered"),
    [
        (0, "tied copy"),
        (3, "tied copy"),
        (1, "replica"),
        (3, "replica"),
        *full((1, "tied copy"), (2, "tied copy"), (0, "replica"), (2, "replica")),
    ],
)
def test_copies_that_drift_apart_are_found(zero: int, tampered: str) -> None:
    if tampered == "replica" and zero == 3:
        run(4, tamper, zero, "nothing")  # ZeRO-3's replicas hold different parts: only ties can be compared
        return
    with pytest.raises(WorkerError, match=r"ReplicasDifferError.*not the same bits"):
        run(4, tamper, zero, tampered)


def tamper(rank: int, zero: int, what: str) -> None:
    """Change the lowest bit of one weight on one rank; the check must notice."""
    engine, _ = build_case_engine(Case(zero=zero, pipeline=2, data_parallel=2))
    engine.check_replicas()
    names = {"tied copy": "lm_head.weight", "replica": "self_attn.q_proj.weight"}
    if rank == 1 and what in names:
        module = engine.engine.module
        weight = next(p for name, p in module.named_parameters() if name.endswith(names[what]))
        held = getattr(weight, "ds_tensor", weight).data.view(-1)
        held[:1].view(torch.int32)[0] ^= 1
    engine.check_replicas()


class Stock:
    """What happens without a mend: each must still be wrong upstream, or the mend can go."""

    @staticmethod
    def train(rank: int, case: Case, undo: str) -> Outcome:
        """Train with one of dstrain's overrides replaced by DeepSpeed's own."""
        from deepspeed.runtime.pipe.engine import PipelineEngine
        from deepspeed.runtime.pipe.schedule import ReduceGrads, ReduceTiedGrads

        from dstrain.engine import deepspeed_patches, pipeline_engine

        if undo == "tied gradients":
            stock = dict(pipeline_engine.StagedEngine._INSTRUCTION_MAP)
            stock[ReduceTiedGrads] = PipelineEngine._exec_reduce_tied_grads
            stock[ReduceGrads] = PipelineEngine._exec_reduce_grads
            pipeline_engine.StagedEngine._INSTRUCTION_MAP = stock
        elif undo == "clipping":
            deepspeed_patches.PatchedEngine.clip_fp32_gradients = PipelineEngine.clip_fp32_gradients
        elif undo == "counting copies":
            deepspeed_patches.is_copy = lambda parameter: False
        elif undo == "micro-batch count of ZeRO-3":
            pipeline_engine._StagedMends.zero_optimization_partition_weights = _only_outside_backward
        return train_in_layout(rank, case)


def _only_outside_backward(self: Any) -> bool:
    """As DeepSpeed's own, but False where the mend asks, in the middle of a backward pass."""
    import sys

    if sys._getframe(1).f_code.co_name == "_exec_backward_pass":
        return False
    return self._config.zero_optimization_stage == 3


@pytest.mark.parametrize(
    ("undo", "case"),
    [
        ("tied gradients", Case(zero=1, pipeline=2, precision="fp16")),
        ("clipping", Case(zero=0, pipeline=2, optimizer="sgd")),
        ("counting copies", Case(zero=0, pipeline=2, optimizer="sgd")),
        ("micro-batch count of ZeRO-3", Case(zero=3, pipeline=4, accumulation=4)),
    ],
    ids=lambda value: str(value).replace(" ", "-"),
)
def test_without_the_mend_another_model_is_trained(undo: str, case: Case) -> None:
    """So that an upgrade of DeepSpeed shows what has changed."""
    with pytest.raises(AssertionError, match=r"is not within|ReplicasDifferError"):
        assert_equal(case, run(case.world_size, Stock.train, case, undo))


@pytest.mark.parametrize(
    "case",
    [
        Case(zero=1, pipeline=3, experts=4, checkpointing=True),
        Case(zero=2, pipeline=2, experts=4, schedule="dualpipev"),
        Case(zero=3, pipeline=1, experts=4),
        *full(
            Case(zero=0, pipeline=2, experts=4),
            Case(zero=2, pipeline=2, experts=4, accumulation=8),
            Case(zero=3, pipeline=2, experts=4),
        ),
    ],
    ids=str,
)
def test_router_loss_is_carried_from_stage_to_stage(case: Case) -> None:
    """Two tensors with gradients travel between stages; upstream would run each backward pass twice."""
    assert_equal(case, run(case.world_size, train_in_layout, case))


@pytest.mark.parametrize(
    "case",
    [
        Case(zero=0, longrope=True),
        Case(zero=2, data_parallel=2, accumulation=2, longrope=True),
        Case(zero=1, pipeline=2, accumulation=8, checkpointing=True, longrope=True),
    ],
    ids=str,
)
def test_each_document_has_its_own_rotary_tables(case: Case) -> None:
    """The yardstick takes one row at a time; upstream's tables would follow from the longest of a micro-batch."""
    assert_equal(case, run(case.world_size, train_in_layout, case))


@pytest.mark.parametrize(
    "case",
    [
        Case(zero=1, pipeline=1, loss_chunk=24),
        Case(zero=2, pipeline=2, loss_chunk=24, schedule="dualpipev"),
        Case(zero=3, pipeline=1, loss_chunk=24, data_parallel=2, tied=False),
        *full(
            Case(zero=2, pipeline=2, loss_chunk=24),
            Case(zero=3, pipeline=2, loss_chunk=24, data_parallel=2),
        ),
    ],
    ids=str,
)
def test_a_loss_in_chunks_of_tokens_is_the_same_loss(case: Case) -> None:
    """24 tokens divide no row of 16 and no micro-batch; the head's weights are used several times a pass."""
    assert_equal(case, run(case.world_size, train_in_layout, case))


def test_operators_are_linked_where_the_path_of_torch_holds_a_space(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the whole suite shows in a checkout with such a path: `.ci/run` makes one."""
    from deepspeed.ops.op_builder.builder import OpBuilder
    from deepspeed.ops.op_builder.cpu import CPUAdamBuilder
    from torch.utils import cpp_extension

    import dstrain.engine.deepspeed_patches  # noqa: F401

    linked_with = []
    monkeypatch.setattr(cpp_extension, "TORCH_LIB_PATH", "/two words/lib")
    monkeypatch.setattr(cpp_extension, "verify_ninja_availability", lambda: None)
    monkeypatch.setattr(cpp_extension, "load", lambda **_: linked_with.append(cpp_extension.TORCH_LIB_PATH))
    monkeypatch.setattr(CPUAdamBuilder, "is_compatible", lambda self, verbose: True)
    monkeypatch.setattr(OpBuilder, "_loaded_ops", {})
    CPUAdamBuilder().load()
    assert linked_with == ["'/two words/lib'"]
    assert cpp_extension.TORCH_LIB_PATH == "/two words/lib"
