"""What is recorded of a launch, and what is found to be another in a second one."""

from __future__ import annotations

import copy
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from dstrain.api.reproducing import _cause as cause
from dstrain.errors import DstrainError
from dstrain.report.comparison import compare_bits
from dstrain.runs.record.differences import differences
from dstrain.runs.record.environment import packages, variables, weights_fingerprint
from dstrain.runs.record.record import append_launch, first_launch, read_launches, write_record
from dstrain.runs.record.source import UNKNOWN, source_of
from dstrain.runs.run_folder import RunFolder
from tests.support.plans import plan


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
    assert (source.changes, source.diff, source.untracked) == (None, b"", 0)


def test_changes_and_new_files_count_by_their_content(repository: Path) -> None:
    (repository / "train.yaml").write_text("zero: 2\n")
    changed = source_of(repository, besides=repository / "runs")
    (repository / "new.txt").write_text("a")
    with_new = source_of(repository, besides=repository / "runs")
    (repository / "new.txt").write_text("b")
    with_other = source_of(repository, besides=repository / "runs")
    assert changed is not None and with_new is not None and with_other is not None
    assert b"+zero: 2" in changed.diff
    assert with_new.names == ("new.txt",)
    assert len({changed.changes, with_new.changes, with_other.changes}) == 3
    # The diff is one that git takes back.
    git(repository, "checkout", "-q", "train.yaml")
    (repository / "source.diff").write_bytes(changed.diff)
    git(repository, "apply", "source.diff")
    assert (repository / "train.yaml").read_text() == "zero: 2\n"


def test_the_diff_is_one_that_git_takes_back_whatever_the_files_hold(repository: Path) -> None:
    """Other encodings, other line ends, and a user who wants no prefixes."""
    git(repository, "config", "diff.noprefix", "true")
    before = {"latin.txt": b"caf\xe9\n", "windows.txt": b"a\r\nb\r\n", "numbers.bin": bytes(range(256))}
    after = {"latin.txt": b"th\xe9\n", "windows.txt": b"a\r\nc\r\n", "numbers.bin": bytes(range(255, -1, -1))}
    for name, content in before.items():
        (repository / name).write_bytes(content)
    git(repository, "add", ".")
    git(repository, "commit", "-q", "-m", "second")
    for name, content in after.items():
        (repository / name).write_bytes(content)
    source = source_of(repository, besides=repository / "runs")
    assert source is not None
    git(repository, "checkout", "-q", ".")
    (repository / "source.diff").write_bytes(source.diff)
    git(repository, "apply", "source.diff")
    assert {name: (repository / name).read_bytes() for name in after} == after


def test_untracked_files_that_can_not_be_read(repository: Path) -> None:
    (repository / "loop").symlink_to("loop")
    (repository / "pipe-to-nowhere").symlink_to("nowhere")
    (repository / os.fsdecode(b"caf\xe9")).write_text("a")
    source = source_of(repository, besides=repository / "runs")
    assert source is not None and source.untracked == 3
    json.dumps(source.names).encode()


def test_a_git_that_fails_does_not_say_that_nothing_was_changed(repository: Path) -> None:
    (repository / ".git" / "index").write_bytes(b"broken")
    source = source_of(repository, besides=repository / "runs")
    assert source is not None and source.changes == UNKNOWN


def test_weights_count_by_their_content(tmp_path: Path) -> None:
    small, large = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    small.write_bytes(b"a" * 1000)
    large.write_bytes(bytes(2**26 + 2**20 + 1))
    found = {weights_fingerprint(tmp_path)}
    small.write_bytes(b"a" * 999 + b"b")
    found.add(weights_fingerprint(tmp_path))
    for place in (0, 2**25, 2**26 + 2**20):  # its beginning, a block in the middle, its last byte
        with large.open("r+b") as file:
            file.seek(place)
            file.write(b"c")
        found.add(weights_fingerprint(tmp_path))
    (tmp_path / "notes.txt").write_text("of no weight")
    found.add(weights_fingerprint(tmp_path))
    assert len(found) == 5


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
    git(tmp_path, "init", "-q")
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
        (("layout", "ranks_a_host"), [2, 2], None),
        (("layout", "cut"), [0, 3, 8], "layout cut: [0, 4, 8] -> [0, 3, 8]"),
        (("model", "weights"), "w", "model weights: nothing -> w"),
        (("batch", "micro_batch"), 16, "batch micro_batch: 2 -> 16"),
        (("deepspeed", "zero_optimization", "stage"), 2, "deepspeed zero_optimization.stage: 1 -> 2"),
        (("python",), "PyPy 3.10", None),
        (("packages", "torch"), "0.1", None),
        (("variables", "OMP_NUM_THREADS"), "4", "variable OMP_NUM_THREADS: 1 -> 4"),
        (("image",), "sha256:1", "image: nothing -> sha256:1"),
        (("devices", 2, "device"), "another", "rank 2's device: a processor -> another"),
        (("source", "revision"), "r", None),
        (("source", "changes"), UNKNOWN, None),
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


def test_a_container_that_sees_no_repository_is_no_difference(launch: dict[str, Any]) -> None:
    assert differences(launch, changed(launch, "source", to=None)) == []


def test_changes_that_git_could_not_name_are_never_the_same(launch: dict[str, Any]) -> None:
    unknown = changed(launch, "source", "changes", to=UNKNOWN)
    assert len(differences(unknown, unknown)) == 1


KEYS = ["name", "runs_dir", "save_every", "hostfile", "keep", "prompt", "model", "data", "eval_every"]


@pytest.mark.parametrize("key", KEYS)
def test_what_does_not_reach_the_numbers_is_not_named(launch: dict[str, Any], key: str) -> None:
    assert differences(launch, changed(launch, "config", key, to="another")) == []


def test_no_record(tmp_path: Path) -> None:
    with pytest.raises(DstrainError, match="no record of its environment"):
        read_launches(RunFolder(tmp_path))


def test_broken_lines_take_no_other_with_them(tmp_path: Path, launch: dict[str, Any]) -> None:
    folder = RunFolder(tmp_path / "runs" / "one")
    whole = folder.launches.read_bytes()
    folder.launches.write_bytes(b"\xff\x00\n" + b"null\n" + whole + whole[:300])
    append_launch(folder, 3, [])
    assert [found["first_step"] for found in read_launches(folder)] == [1, 3]


def test_a_run_that_an_earlier_dstrain_began(tmp_path: Path, launch: dict[str, Any]) -> None:
    folder = RunFolder(tmp_path)
    assert first_launch([launch, {**launch, "first_step": 3}], folder) is launch
    again = {**launch}
    assert first_launch([launch, again], folder) is again, "the last that began with step 1"
    with pytest.raises(DstrainError, match="trained by an older dstrain"):
        first_launch([{**launch, "first_step": 3}], folder)
    with pytest.raises(DstrainError, match="recorded only its own part"):
        first_launch([{"first_step": 1, "format": 1}], folder)


def test_the_cause_is_what_changed_before_the_first_number_that_differs(launch: dict[str, Any]) -> None:
    second = changed(changed(launch, "config", "seed", to=5), "first_step", to=3)
    now = changed(launch, "packages", "torch", to="0.1")
    found = differences(launch, now)
    assert cause(2, [launch, second], launch, found).startswith("differences from the original run: torch: ")
    changed_then = "the run itself changed at step 3: seed: 1234 -> 5"
    assert cause(3, [launch, second], launch, []) == changed_then
    told = cause(3, [launch, second], launch, found)
    assert told.startswith(f"{changed_then}; differences now: torch: ")
    nothing = cause(2, [launch, second], launch, [])
    assert "no recorded condition differs" in nothing and "--deterministic" in nothing
    calm = changed(launch, "config", "deterministic", to=True)
    assert "--deterministic" not in cause(2, [calm], calm, [])


@pytest.mark.parametrize(
    ("was", "now", "said"),
    [
        ([{"step": 1, "loss": 0.1}], [{"step": 1, "loss": 0.1}], "equal"),
        ([{"step": 1, "loss": 0.1}], [{"step": 1, "loss": 0.1 + 2e-17}], "step 1: loss was 0.1 and is 0.1"),
        ([{"step": 1, "loss": 0.1, "seconds": 1}], [{"step": 1, "loss": 0.1, "seconds": 2}], "equal"),
        ([{"step": 1, "grad_norm": None}], [{"step": 1, "grad_norm": 1.0}], "step 1: grad_norm was None and is 1.0"),
        (
            [{"step": 0, "validation_loss": 1.0}],
            [{"step": 0, "validation_loss": 2.0}],
            "before training: validation_loss",
        ),
        ([{"step": 1, "loss": 0.1}, {"step": 2, "loss": 0.1}], [{"step": 1, "loss": 0.1}], "equal to step 1 of 2"),
        ([{"step": 1, "loss": 0.1, "validation_loss": 1.0}], [{"step": 1, "loss": 0.1}], "equal"),
        ([{"step": 1, "loss": float("nan")}], [{"step": 1, "loss": float("nan")}], "equal"),
    ],
)  # fmt: skip
def test_bits_are_compared(tmp_path: Path, was: list[Any], now: list[Any], said: str) -> None:
    folders = []
    for name, lines in (("was", was), ("now", now)):
        folder = RunFolder(tmp_path / name)
        folder.path.mkdir()
        folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
        folders.append(folder)
    found = compare_bits(*folders)
    shorter = f" to step {found.steps} of {found.of_run}" if found.of_run > found.of_again else ""
    told = f"equal{shorter}" if found.deviation is None else str(found.deviation)
    assert told.startswith(said)
    assert shorter in said
