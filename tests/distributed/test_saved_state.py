"""A checkpoint read offline holds, to the bit, what its ranks held: weights, fp32 masters, optimizer states."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dstrain.errors import DstrainError
from tests.support.distributed import training
from tests.support.distributed.training import Case
from tests.support.distributed.workers import run
from tests.support.sampling import full, heavy

FROZEN = ("model.layers.0.*", "model.layers.1.mlp.*")
SHORT = Case(steps=2)

CASES = [
    replace(SHORT, zero=0),
    replace(SHORT, zero=0, data_parallel=2, freeze=FROZEN),
    replace(SHORT, zero=0, pipeline=2, optimizer="sgd"),
    replace(SHORT, zero=1, data_parallel=2, precision="bf16"),
    replace(SHORT, zero=1, pipeline=2, precision="fp16"),
    replace(SHORT, zero=1, pipeline=2, precision="bf16", schedule="dualpipev"),
    replace(SHORT, zero=2, data_parallel=4, accumulation=1, optimizer="sgd", layers=3),
    replace(SHORT, zero=2, pipeline=2, data_parallel=2, freeze=FROZEN),
    replace(SHORT, zero=3, data_parallel=2, freeze=FROZEN, precision="bf16"),
    replace(SHORT, zero=3, pipeline=2, data_parallel=2, precision="fp16"),
    *heavy(
        replace(SHORT, zero=2, pipeline=2, data_parallel=2, offload="cpu"),
        replace(SHORT, zero=3, data_parallel=2, precision="bf16", offload="cpu"),
    ),
    *full(
        replace(SHORT, zero=0, pipeline=2, schedule="dualpipev"),
        replace(SHORT, zero=1, pipeline=2, data_parallel=2),
        replace(SHORT, zero=1, pipeline=4, precision="bf16", tied=False),
        replace(SHORT, zero=2, pipeline=2, data_parallel=2, precision="bf16"),
        replace(SHORT, zero=2, pipeline=2, data_parallel=2, schedule="dualpipev"),
        replace(SHORT, zero=3, data_parallel=4, accumulation=2, optimizer="sgd"),
    ),
]

KEYS = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}

States = dict[str, dict[str, torch.Tensor]]


def train_and_tell(rank: int, case: Case, folder: str, momentum: float) -> tuple[Any, States]:
    """Train, save, and give this rank's live weights (in fp32) and states, as DeepSpeed's own getters see them."""
    built: list[Any] = []
    build, plan_of = training.build_case_engine, training.make_case_plan

    def plan_with_momentum(case: Case) -> Any:
        plan = plan_of(case)
        if case.optimizer == "sgd":
            plan.deepspeed["optimizer"]["params"]["momentum"] = momentum
        return plan

    training.make_case_plan = plan_with_momentum
    training.build_case_engine = lambda case: built.append(build(case)) or built[-1]
    outcome = training.train_in_layout(rank, case, folder)
    return outcome.weights, live_states(built[0][0].engine, KEYS[case.optimizer])


def live_states(engine: Any, keys: Sequence[str]) -> States:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    from dstrain.engine.checkpoint_state import MASTER
    from dstrain.engine.client_optimizer import hugging_face_name

    if engine.zero_optimization_stage() in (1, 2):
        # DeepSpeed links the states behind the step of the first group, when the others have none yet.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    found: States = {}
    for name, parameter in engine.module.named_parameters(remove_duplicate=False):
        states = found[hugging_face_name(name)] = {}
        if not parameter.requires_grad:
            continue
        if not engine.zero_optimization():
            states |= {k: v for k, v in engine.optimizer.state[parameter].items() if getattr(v, "ndim", 0)}
            continue
        states[MASTER] = safe_get_full_fp32_param(parameter).clone()
        for key in keys:  # collective: all ranks must ask for the same
            states[key] = safe_get_full_optimizer_state(parameter, key).clone()
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_read_offline_is_equal_to_the_bit(case: Case, tmp_path: Path) -> None:
    from dstrain.engine.checkpoint_state import MASTER, SavedState

    ranks = run(case.world_size, train_and_tell, case, str(tmp_path), 0.9)
    assert not torch.distributed.is_initialized()
    parameters = SavedState(tmp_path).parameters
    live = {name: value for weights, _ in ranks for name, value in weights.items()}
    states = {name: value for _, told in ranks for name, value in told.items()}
    assert parameters.keys() == live.keys() == states.keys()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[case.precision]
    keys = set(KEYS[case.optimizer])
    for name, parameter in parameters.items():
        weight = parameter.weight.read()
        assert weight.dtype == dtype and torch.equal(weight.float(), live[name]), name
        frozen = training.is_frozen(name, case.freeze)
        assert set(parameter.states) == (set() if frozen else keys | ({MASTER} if case.zero else set())), name
        for key, want in states[name].items():
            found = parameter.states[key].read()
            assert found.dtype == want.dtype and torch.equal(found, want), (name, key)
        assert parameter.states.keys() == states[name].keys(), name
        if case.optimizer == "adamw" and not frozen:
            assert parameter.values == {"step": case.steps}
        if case.zero and not frozen:
            assert torch.equal(parameter.most_precise.read().to(dtype), weight), name


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    case = replace(SHORT, zero=1, pipeline=2, data_parallel=2)
    run(case.world_size, train_and_tell, case, str(folder), 0.0)
    return folder


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


class Evil:
    """What unpickles into a call of whatever it likes."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (Path.touch, (self.target,))


def poison(path: Path) -> None:
    torch.save({"module": Evil(path.with_name("touched"))}, path)


@pytest.mark.parametrize(
    ("file", "damage", "words"),
    [
        ("zero_pp_rank_1_mp_rank_00_optim_states.pt", Path.unlink, "files of some ranks are missing"),
        ("mp_rank_01_model_states.pt", Path.unlink, "some stages are missing"),
        ("zero_pp_rank_0_mp_rank_01_optim_states.pt", cut_in_half, "can't be read"),
        ("layer_02-model_states.pt", cut_in_half, "can't be read"),
        ("mp_rank_00_model_states.pt", poison, "does not belong in a checkpoint"),
        ("offloaded_tensors", Path.mkdir, "swap files"),
    ],
)
def test_what_is_damaged_or_unreadable_is_said(
    file: str, damage: Callable[[Path], None], words: str, saved: Path, tmp_path: Path
) -> None:
    from dstrain.engine.checkpoint_state import SavedState

    shutil.copytree(saved, tmp_path / "copy")
    damage(tmp_path / "copy" / "state" / file)
    with pytest.raises(DstrainError, match=words):
        for parameter in SavedState(tmp_path / "copy").parameters.values():
            parameter.weight.read()
    assert not (tmp_path / "copy" / "state" / "touched").exists(), "code of the file was run"


def test_a_poisoned_file_would_run_code_elsewhere(tmp_path: Path) -> None:
    """So that the case above shows something."""
    poison(tmp_path / "file.pt")
    torch.load(tmp_path / "file.pt", weights_only=False)
    assert (tmp_path / "touched").exists()
    assert pickle.dumps(Evil(tmp_path))


def test_a_folder_without_state(tmp_path: Path) -> None:
    from dstrain.engine.checkpoint_state import SavedState

    with pytest.raises(DstrainError, match="no DeepSpeed state"):
        SavedState(tmp_path)
