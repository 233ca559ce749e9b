"""Real checkpoints, injured in every way: each injury is found, and none is trained on."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.distributed.training import Case, build_case_engine, samples
from tests.support.distributed.workers import WorkerError, run

CASE = Case(zero=1, pipeline=2, layers=2, steps=6)
RUN, OTHER_RUN = "0123456789abcdef", "fedcba9876543210"
NEWEST, BEFORE = "step-000006", "step-000004"

FILES = (
    "state/layer_00-model_states.pt",
    "state/layer_03-model_states.pt",
    "state/mp_rank_01_model_states.pt",
    "state/zero_pp_rank_0_mp_rank_00_optim_states.pt",
)


def micro_batches(case: Case, replica: int, step: int) -> list[Any]:
    from dstrain.engine.interface import MicroBatch

    ids, positions, labels = samples(step)
    weight = torch.tensor([case.accumulation * case.data_parallel / int((labels != -100).sum())])
    starts = [(index * case.data_parallel + replica) * case.micro_batch for index in range(case.accumulation)]
    rows = [slice(start, start + case.micro_batch) for start in starts]
    return [MicroBatch(ids[row], positions[row], labels[row], weight) for row in rows]


def checkpoints_of(folder: str, plan: Any = None, **options: Any) -> Any:
    from dstrain.train.checkpointing.checkpoints import Checkpoints

    options = {"keep": 3, "run": RUN, "config": {"lr": 1.0}, **options}
    return Checkpoints(Path(folder), identity=plan.identity if plan else {}, **options)


def train(rank: int, case: Case, folder: str, run_id: str = RUN, until: int = 6) -> dict[str, Any]:
    """Train from the newest checkpoint on and save every other step; tells the losses by step, and what was said."""
    engine, plan = build_case_engine(case)
    said: list[str] = []
    checkpoints = checkpoints_of(folder, plan, run=run_id, say=said.append)
    first = checkpoints.load_newest(engine) + 1
    losses = {}
    for step in range(first, until + 1):
        batches = micro_batches(case, plan.layout.replica(rank), step)
        losses[step] = engine.train_batch(batches, case.lr).loss
        if step % 2 == 0:
            checkpoints.save(engine, step)
    return {"losses": losses, "said": said}


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """``checkpoints/`` with steps 2, 4 and 6, and what rank 0 told."""
    folder = tmp_path_factory.mktemp("healthy") / "checkpoints"
    return folder, run(2, train, CASE, str(folder))[0]


@pytest.fixture(scope="module")
def other_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("other") / "checkpoints"
    run(2, train, CASE, str(folder), OTHER_RUN)
    return folder


def cut_byte(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def cut_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def become_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def dangle(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def flip(at: float) -> Callable[[Path], None]:
    def injure(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[int(at * (len(content) - 1))] ^= 1
        path.write_bytes(content)

    return injure


def swap(path: Path) -> None:
    """With the same file of the step before."""
    twin = path.parents[2] / BEFORE / path.relative_to(path.parents[1])
    mine = path.read_bytes()
    path.write_bytes(twin.read_bytes())
    twin.write_bytes(mine)


WAYS: dict[str, Callable[[Path], None]] = {
    "cut by a byte": cut_byte,
    "cut in half": cut_half,
    "emptied": empty,
    "deleted": Path.unlink,
    "a byte longer": append,
    "zeros": zeros,
    "a folder": become_folder,
    "a dangling link": dangle,
    "first bit": flip(0.0),
    "a bit in the middle": flip(0.5),
    "last bit": flip(1.0),
    "swapped between steps": swap,
}


def of_manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Change the manifest of the newest without telling its checksum."""

    def injure(folder: Path) -> None:
        path = folder / NEWEST / "manifest.json"
        manifest = json.loads(path.read_text())
        changed = change(manifest)
        path.write_text(json.dumps(manifest if changed is None else changed))

    return injure


def exchange(folder: Path) -> None:
    (folder / NEWEST).rename(folder / "aside")
    (folder / BEFORE).rename(folder / NEWEST)
    (folder / "aside").rename(folder / BEFORE)


def write_manifest(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / NEWEST / "manifest.json").write_text(text) and None


def older_manifest(folder: Path) -> None:
    shutil.copy(folder / BEFORE / "manifest.json", folder / NEWEST / "manifest.json")


FIRST = FILES[0]
OF_MANIFESTS: dict[str, Callable[[Path], None]] = {
    "no manifest": lambda folder: (folder / NEWEST / "manifest.json").unlink(),
    "empty manifest": write_manifest(""),
    "half a manifest": lambda folder: cut_half(folder / NEWEST / "manifest.json"),
    "a bit of the manifest": lambda folder: flip(0.5)(folder / NEWEST / "manifest.json"),
    "a manifest that is a list": write_manifest("[]"),
    "a manifest of nothing": write_manifest('{"step": 6, "files": {}}'),
    "the manifest of another step": older_manifest,
    "step changed": of_manifest(lambda m: m.update(step=5)),
    "layout changed": of_manifest(lambda m: m["identity"].update(pipeline=1)),
    "run changed": of_manifest(lambda m: m.update(run=OTHER_RUN)),
    "a file left out": of_manifest(lambda m: m["files"].pop(FIRST) and None),
    "a size changed": of_manifest(lambda m: m["files"][FIRST].update(size=1)),
    "a checksum changed": of_manifest(lambda m: m["files"][FIRST].update(sha256="0" * 64)),
    "of a later format": of_manifest(lambda m: m.update(format=99)),
    "steps exchanged": exchange,
    "the whole state gone": lambda folder: shutil.rmtree(folder / NEWEST / "state"),
}

INJURIES: dict[str, Callable[[Path], None]] = {
    **{
        f"{Path(name).name}: {way}": lambda folder, name=name, injure=injure: injure(folder / NEWEST / name)
        for name in FILES
        for way, injure in WAYS.items()
    },
    **OF_MANIFESTS,
}


def look(rank: int, healthy: str, scratch: str, injuries: list[str]) -> dict[str, Any]:
    """Injure copies, one for each injury, and let both ranks choose: the name that is chosen, and what is said."""
    from torch import distributed

    found = {}
    for number, name in enumerate(injuries):
        folder = Path(scratch) / str(number)
        if rank == 0:
            shutil.copytree(healthy, folder)
            INJURIES[name](folder)
        distributed.barrier()
        said: list[str] = []
        chosen = checkpoints_of(str(folder), say=said.append).newest_usable()
        found[name] = (chosen.name if chosen else None, said)
    return found


@pytest.fixture(scope="module")
def looked(healthy: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(2, look, str(healthy[0]), str(tmp_path_factory.mktemp("injured")), list(INJURIES))


def test_there_are_fifty() -> None:
    assert len(INJURIES) >= 50


@pytest.mark.parametrize("injury", INJURIES)
def test_an_injury_is_found_and_the_one_before_is_used(injury: str, looked: list[dict[str, Any]]) -> None:
    (chosen, said), (of_the_other, silent) = (rank[injury] for rank in looked)
    swapped = "swapped" in injury or "exchanged" in injury  # both of them are injured
    assert chosen == of_the_other == ("step-000002" if swapped else BEFORE)
    assert not silent, "rank 0 speaks"
    lines = [line for line in said if line.startswith(f"{NEWEST} is skipped: ")]
    assert len(lines) == 1 and "\n" not in lines[0], said
    file = injury.split(": ")[0]
    assert file in lines[0] or not file.endswith(".pt"), lines


def test_a_healthy_one_is_used_without_a_word(healthy: tuple[Path, Any]) -> None:
    for chosen, said in run(2, look_at, str(healthy[0])):
        assert (chosen, said) == (NEWEST, [])


def look_at(rank: int, folder: str) -> tuple[str | None, list[str]]:
    said: list[str] = []
    chosen = checkpoints_of(folder, say=said.append).newest_usable()
    return chosen.name if chosen else None, said


def test_what_is_trained_after_an_injury_is_what_would_have_been_trained(
    healthy: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, unbroken = tmp_path / "checkpoints", healthy[1]
    shutil.copytree(healthy[0], folder)
    INJURIES["layer_03-model_states.pt: a bit in the middle"](folder)
    told = run(2, train, CASE, str(folder), RUN, 8)[0]
    assert [line for line in told["said"] if line.startswith(f"{NEWEST} is skipped: ")]
    assert list(told["losses"]) == [5, 6, 7, 8]
    assert {step: told["losses"][step] for step in (5, 6)} == {
        step: unbroken["losses"][step] for step in (5, 6)
    }
    assert run(2, look_at, str(folder))[0] == ("step-000008", []), "the damaged one was replaced"


def test_a_checkpoint_of_another_run_is_passed_over(
    healthy: tuple[Path, Any], other_run: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(healthy[0], folder, ignore=shutil.ignore_patterns(NEWEST))
    shutil.copytree(other_run / NEWEST, folder / NEWEST)
    chosen, said = run(2, look_at, str(folder))[0]
    assert chosen == BEFORE
    why = f"it belongs to another run ({OTHER_RUN}, this one is {RUN})"
    assert said == [f"{NEWEST} is skipped: {why}; the run continues from {BEFORE}"]


def test_no_usable_one_left_is_an_error_and_no_new_start(healthy: tuple[Path, Any], tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(healthy[0], folder)
    for checkpoint in folder.iterdir():
        flip(0.5)(checkpoint / FILES[3])
    with pytest.raises(WorkerError, match="no checkpoint of this run is usable") as error:
        run(2, look_at, str(folder))
    for step in (2, 4, 6):
        assert f"step-{step:06d}: zero_pp_rank_0_mp_rank_00_optim_states.pt" in str(error.value).replace(
            "state/", ""
        )


def test_half_written_ones_are_no_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / ".step-000002.partial" / "state").mkdir(parents=True)
    assert run(2, look_at, str(tmp_path / "checkpoints"))[0] == (None, [])


def train_until_full(rank: int, case: Case, folder: str, most: int) -> str:
    """Train, with files limited to ``most`` bytes: what the disk would say of a larger one."""
    from dstrain.errors import DstrainError

    if rank == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    try:
        train(rank, case, folder, RUN, 8)
    except DstrainError as error:
        return str(error)
    return ""


def test_a_disk_that_takes_no_more_is_one_error(healthy: tuple[Path, Any], tmp_path: Path) -> None:
    case = replace(CASE, zero=1, pipeline=1)
    folder = tmp_path / "checkpoints"
    run(1, train, case, str(folder))
    said = run(1, train_until_full, case, str(folder), 100_000)[0]
    assert "the checkpoint of step 8 could not be written: " in said
    assert f"hint: {NEWEST} is complete and can be resumed from" in said
    left = sorted(path.name for path in folder.iterdir())
    assert left == ["step-000002", BEFORE, NEWEST], "what was written of the new one is gone"
    assert run(1, look_at, str(folder))[0] == (NEWEST, [])
