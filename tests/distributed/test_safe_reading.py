"""A checkpoint's files are data: what they name is neither imported nor run, by whatever way they are read."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.config import ZeroStageEnum

from dstrain.engine.safe_unpickling import load_safely
from dstrain.errors import DstrainError
from tests.support.distributed import training
from tests.support.distributed.elsewhere import ZERO1_PP2, ZERO2_DP2, ZERO3_DP2
from tests.support.distributed.training import Case, Outcome
from tests.support.distributed.workers import WorkerError, run

SHORT = Case(steps=1)
FROZEN = ("model.layers.0.*",)


class Call:
    """What unpickles into a call of whatever it likes."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    run(2, training.train_in_layout, replace(SHORT, **ZERO1_PP2), str(folder))
    return folder


def calls(marker: Path) -> dict[str, Call]:
    return {
        "posix.system": Call(os.system, f"touch {marker}"),
        "eval": Call(eval, f"open({str(marker)!r}, 'w')"),
        "getattr": Call(getattr, torch.nn.Parameter, "__init_subclass__"),
        "functools.partial": Call(getattr, Call(functools.partial, os.system, f"touch {marker}"), "func"),
    }


def load(rank: int, case: Case, folder: str, other_layout: bool) -> None:
    engine, _ = training.build_case_engine(case)
    engine.load(Path(folder), other_layout=other_layout)


@pytest.mark.parametrize("layout", [ZERO1_PP2, ZERO2_DP2], ids=["the same layout", "another layout"])
@pytest.mark.parametrize(
    "file",
    [
        "mp_rank_00_model_states.pt",
        "layer_02-model_states.pt",
        "zero_pp_rank_0_mp_rank_01_optim_states.pt",
    ],
)
def test_a_file_that_would_run_code_is_refused(
    file: str, layout: dict[str, Any], saved: Path, tmp_path: Path
) -> None:
    marker, folder = tmp_path / "marker", tmp_path / "copy"
    shutil.copytree(saved, folder)
    path = folder / "state" / file
    content = load_safely(path)
    torch.save(content | {"more": calls(marker)["posix.system"]}, path)
    with pytest.raises(WorkerError) as error:
        run(2, load, replace(SHORT, **layout), str(folder), layout != ZERO1_PP2)
    said = str(error.value)
    assert "DstrainError" in said and file in said, said
    assert (
        "refers to posix.system, which does not belong in a checkpoint" in said and "no code was run" in said
    )
    assert not marker.exists(), "code of the file was run"


@pytest.mark.parametrize("named", ["posix.system", "eval", "getattr", "functools.partial"])
@pytest.mark.parametrize("zipped", [True, False])
def test_what_would_run_code_otherwise(named: str, zipped: bool, tmp_path: Path) -> None:
    path, marker = tmp_path / "file.pt", tmp_path / "marker"
    torch.save({"a": calls(marker)[named]}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(DstrainError, match=f"refers to {named}, which does not belong in a checkpoint"):
        load_safely(path)
    with pytest.raises(DstrainError):
        load_safely(path, mapped=True)
    assert not marker.exists()
    if named in ("posix.system", "eval"):  # so that this shows something
        torch.load(path, weights_only=False)
        assert marker.exists()


def test_a_member_of_an_enumeration_as_every_python_writes_it(tmp_path: Path) -> None:
    stage, path = ZeroStageEnum.gradients, tmp_path / "file.pt"
    for written in (stage, Call(ZeroStageEnum, stage.value), Call(getattr, ZeroStageEnum, stage.name)):
        torch.save({"zero_stage": written}, path)
        assert load_safely(path) == {"zero_stage": stage}


def test_a_file_that_is_missing_or_cut(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(DstrainError, match=r"can't be read: .*No such file"):
        load_safely(tmp_path / "none.pt")
    path = tmp_path / "half.pt"
    whole = (saved / "state" / "mp_rank_00_model_states.pt").read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DstrainError, match="can't be read: "):
        load_safely(path)


def load_and_note(rank: int, case: Case, folder: str) -> list[bool | None]:
    """Train, save, and load in an engine of the same layout; how each file was read."""
    training.train_in_layout(rank, case, folder)
    read, noted = torch.load, []

    def noting(*args: Any, **options: Any) -> Any:
        noted.append(options.get("weights_only"))
        return read(*args, **options)

    torch.load = noting
    training.train_in_layout(rank, replace(case, steps=case.steps + 1), start_from=folder)
    return noted


@pytest.mark.parametrize(
    "case",
    [
        replace(SHORT, zero=0, data_parallel=2),
        replace(SHORT, zero=1, pipeline=2, precision="fp16"),
        replace(SHORT, zero=2, pipeline=2, schedule="dualpipev", precision="bf16"),
        replace(SHORT, **ZERO3_DP2, freeze=FROZEN),
    ],
    ids=str,
)
def test_deepspeed_reads_every_file_as_data(case: Case, tmp_path: Path) -> None:
    for noted in run(2, load_and_note, case, str(tmp_path)):
        assert noted and all(weights_only is True for weights_only in noted), noted


def resume_universal(rank: int, case: Case) -> Outcome:
    plan_of = training.make_case_plan

    def make_case_plan(case: Case) -> Any:
        plan = plan_of(case)
        plan.deepspeed["checkpoint"]["load_universal"] = True
        return plan

    training.make_case_plan = make_case_plan
    return training.train_in_layout(rank, case)


def test_a_universal_checkpoint_is_refused() -> None:
    with pytest.raises(WorkerError, match=r"DstrainError: .*checkpoint\.load_universal lets DeepSpeed run"):
        run(1, resume_universal, replace(SHORT, zero=1))
