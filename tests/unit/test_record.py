"""What is recorded of a launch, and what is found to be another in a second one."""

from __future__ import annotations

import copy
import subprocess
from pathlib import Path
from typing import Any

import pytest

from dstrain.errors import DstrainError
from dstrain.plan.run_folder import RunFolder
from dstrain.record.differences import differences
from dstrain.record.record import append_launch, read_launches, write_record
from dstrain.record.source import source_of
from dstrain.record.surroundings import variables
from dstrain.record.versions import packages
from dstrain.report.repetition import compare_bits
from tests.unit.plans import plan


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "mine"
    folder.mkdir()
    git(folder, "init", "-q")
    (folder / "train.yaml").write_text("zero: 1\n")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "first")
    return folder


def test_a_clean_folder_is_its_revision(repository: Path) -> None:
    (repository / "runs").mkdir()
    (repository / "runs" / "metrics.jsonl").write_text("{}\n")
    source = source_of(repository / "runs", besides=repository / "runs")
    assert source is not None
    assert source.revision == git(repository, "rev-parse", "HEAD")
    assert (source.changes, source.diff, source.untracked) == (None, "", ())


def test_changes_and_new_files_count_by_their_content(repository: Path) -> None:
    (repository / "train.yaml").write_text("zero: 2\n")
    changed = source_of(repository, besides=repository / "runs")
    (repository / "new.txt").write_text("a")
    with_new = source_of(repository, besides=repository / "runs")
    (repository / "new.txt").write_text("b")
    with_other = source_of(repository, besides=repository / "runs")
    assert changed is not None and with_new is not None and with_other is not None
    assert "+zero: 2" in changed.diff
    assert with_new.untracked == ("new.txt",)
    assert len({changed.changes, with_new.changes, with_other.changes}) == 3
    # The diff is one that git takes back.
    git(repository, "checkout", "-q", "train.yaml")
    (repository / "source.diff").write_text(changed.diff)
    git(repository, "apply", "source.diff")
    assert (repository / "train.yaml").read_text() == "zero: 2\n"


def test_a_repository_without_a_commit_and_a_folder_without_a_repository(tmp_path: Path) -> None:
    assert source_of(tmp_path, besides=tmp_path / "runs") is None
    git(tmp_path, "init", "-q")
    (tmp_path / "a").write_text("a")
    source = source_of(tmp_path, besides=tmp_path / "runs")
    assert source is not None
    assert source.revision is None and source.changes is not None


def test_variables_are_those_that_reach_the_numbers() -> None:
    environment = {
        "OMP_NUM_THREADS": "2", "NCCL_ALGO": "Ring", "NCCL_DEBUG": "INFO", "HOME": "/root", "PATH": "/bin",
        "CUDA_VISIBLE_DEVICES": "3", "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "TORCH_X": "",
    }  # fmt: skip
    assert list(variables(environment)) == ["CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO", "OMP_NUM_THREADS"]


def test_packages_are_those_that_are_imported() -> None:
    import pydantic

    found = packages()
    assert found["pydantic"] == pydantic.VERSION
    assert "typing-extensions" in found and not any("_" in name for name in found)


@pytest.fixture
def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A record as a launch leaves it."""
    monkeypatch.chdir(tmp_path)
    folder = RunFolder(tmp_path / "runs" / "one")
    folder.path.mkdir(parents=True)
    write_record(folder, plan(pipeline=2, data_parallel=2), {"OMP_NUM_THREADS": "1"})
    append_launch(folder, 1, [{"device": "a processor", "threads": 1}] * 4)
    return read_launches(folder)[0]


def changed(launch: dict[str, Any], *path: str | int, to: Any) -> dict[str, Any]:
    other = copy.deepcopy(launch)
    place = other
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = to
    return other


@pytest.mark.parametrize(
    ("path", "to", "said"),
    [
        (("data", "fingerprint"), "g" * 32, f"data fingerprint: {'f' * 32} -> {'g' * 32}"),
        (("tokenizer", "fingerprint"), "t", "tokenizer fingerprint: nothing -> t"),
        (("config", "seed"), 5, "seed: 1234 -> 5"),
        (("config", "lr"), 1.0, "lr: 0.0003 -> 1.0"),
        (("layout", "cut"), [0, 3, 8], "layout cut: [0, 4, 8] -> [0, 3, 8]"),
        (("batch", "micro_batch"), 16, "batch micro_batch: 2 -> 16"),
        (("deepspeed", "zero_optimization", "stage"), 2, "deepspeed zero_optimization.stage: 1 -> 2"),
        (("python",), "PyPy 3.10", None),
        (("packages", "torch"), "0.1", None),
        (("variables", "OMP_NUM_THREADS"), "4", "variable OMP_NUM_THREADS: 1 -> 4"),
        (("image",), "sha256:1", "image: nothing -> sha256:1"),
        (("devices", 2, "device"), "another", "rank 2's device: a processor -> another"),
        (("source",), {"revision": "r", "changes": None}, "the folder's git revision: nothing -> r"),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_one_thing_that_was_changed_is_named(
    launch: dict[str, Any], path: tuple[str | int, ...], to: Any, said: str | None
) -> None:
    found = [str(difference) for difference in differences(launch, changed(launch, *path, to=to))]
    assert len(found) == 1
    if said is not None:
        assert found == [said]
    else:
        assert found[0].endswith(f" -> {to}")


@pytest.mark.parametrize("key", ["name", "runs_dir", "save_every", "hostfile", "keep", "prompt"])
def test_what_does_not_reach_the_numbers_is_not_named(launch: dict[str, Any], key: str) -> None:
    assert differences(launch, changed(launch, "config", key, to="another")) == []


def test_no_record(tmp_path: Path) -> None:
    with pytest.raises(DstrainError, match="no record of what it was made of"):
        read_launches(RunFolder(tmp_path))


@pytest.mark.parametrize(
    ("was", "now", "said"),
    [
        ([{"step": 1, "loss": 0.1}], [{"step": 1, "loss": 0.1}], "equal"),
        ([{"step": 1, "loss": 0.1}], [{"step": 1, "loss": 0.1 + 2e-17}], "step 1: loss was 0.1 and is 0.1"),
        ([{"step": 1, "loss": 0.1, "seconds": 1}], [{"step": 1, "loss": 0.1, "seconds": 2}], "equal"),
        ([{"step": 1, "grad_norm": None}], [{"step": 1, "grad_norm": 1.0}], "step 1: grad_norm was None and is 1.0"),
        ([{"step": 0, "held_out_loss": 1.0}], [{"step": 0, "held_out_loss": 2.0}], "before training: held_out_loss"),
        ([{"step": 1, "loss": 0.1}, {"step": 2, "loss": 0.1}], [{"step": 1, "loss": 0.1}], "missing 2"),
    ],
)  # fmt: skip
def test_bits_are_compared(tmp_path: Path, was: list[Any], now: list[Any], said: str) -> None:
    import json

    folders = []
    for name, lines in (("was", was), ("now", now)):
        folder = RunFolder(tmp_path / name)
        folder.path.mkdir()
        folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
        folders.append(folder)
    found = compare_bits(*folders)
    told = (
        "equal"
        if found.equal
        else f"missing {found.missing}"
        if found.deviation is None
        else str(found.deviation)
    )
    assert told.startswith(said)
