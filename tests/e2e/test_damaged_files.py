"""A damaged file in a run folder: each command that reads it ends with one message, or does without the file.

So it is where a link, a folder, a pipe or a socket lies in the place of a file. What a child process or a rank finds
out reaches the user with place and way out.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from tests.support.made_run import COMMANDS, MadeRun, make_run, one_error

DAMAGED = {
    "no JSON": b"{nonsense",
    "a number of 6,000 digits": b'{"format": 2, "step": ' + b"7" * 6000 + b"}",
    "a list": b"[]",
    "nothing": b"",
    "an empty object": b"{}",
    "no text": bytes(range(256)),
}


def _link_to_itself_elsewhere(path: Path) -> None:
    kept = path.with_name("kept")
    path.rename(kept)
    path.symlink_to(kept)


def _socket(path: Path) -> None:
    here = os.open(path.parent, os.O_RDONLY)  # a socket's path has at most 107 bytes
    try:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(f"/proc/self/fd/{here}/{path.name}")
    finally:
        os.close(here)


KINDS: dict[str, Callable[[Path], None]] = {
    "a link": _link_to_itself_elsewhere,
    "a dead link": lambda path: path.symlink_to("nowhere"),
    "a link in a circle": lambda path: path.symlink_to(path.name),
    "a folder": Path.mkdir,
    "a pipe": os.mkfifo,
    "a socket": _socket,
}
FILES = (
    "config.yaml", "plan.json", "metrics.jsonl", "result.json", "record.json", "launches.jsonl", "run-id",
    "model/config.json", "ds_config.json", ".lock", "environment", "checkpoints/step-000002/manifest.json",
    "checkpoints/step-000002/DAMAGED",
)  # fmt: skip
FOLDERS = ("model", "logs", "checkpoints", "checkpoints/step-000002", "checkpoints/step-000002/state")
READERS = {
    **{name: COMMANDS[name] for name in ("resume", "checkpoints", "export")},
    "reproduce": ("reproduce", "old", "--name", "again"),
    "config show": ("config", "show", "--config", "runs/old/config.yaml"),
    "config diff": ("config", "diff", "old", "old"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, materials: Path) -> MadeRun:
    return make_run(tmp_path_factory.mktemp("made"), materials)


def put(kind: str, path: Path) -> None:
    """Let something that is no file lie in the place of a file or folder."""
    if not kind.startswith("a link"):
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
    elif not path.exists():
        path.touch()
    if kind == "a link in a circle":
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    KINDS[kind](path)


def wrong_with(made: MadeRun, file: str, damage: str, command: tuple[str, ...]) -> str | None:
    """What is wrong with a command where ``file``, below its folder, has a kind of damage."""
    made.restore()
    path = made.place / file
    if damage in DAMAGED:
        path.write_bytes(DAMAGED[damage])
    else:
        put(damage, path)
    try:
        said = made.call(*command, seconds=200)
    except TimeoutError as error:
        return f"{command}, {file} is {damage}: it hangs: {error}"
    if said.code == 0 or (command[0] == "checkpoints" and said.code == 1 and "damaged: " in said.out):
        return None
    wrong = one_error(said)
    if wrong is None and path.name not in said.err and path.parent.name not in said.err:
        wrong = "no place"
    return f"{command}, {file} is {damage}: {wrong}\n{said.err[-800:]}" if wrong else None


@pytest.mark.parametrize("damage", ("no JSON", "a number of 6,000 digits"))
def test_a_plan_that_a_child_process_reads(made: MadeRun, damage: str) -> None:
    made.restore()
    plan = made.place / "runs" / "old" / "plan.json"
    plan.write_bytes(DAMAGED[damage])
    said = made.call(*READERS["export"])
    assert said.code == 2 and one_error(said) is None, said
    assert (
        f"error: {plan}" in said.err and "the plan is damaged: " in said.err and "dstrain resume" in said.err
    )


def test_a_checkpoint_that_is_cut_off(made: MadeRun) -> None:
    made.restore()
    file = next((made.place / "runs/old/checkpoints/step-000002/state").glob("*model_states.pt"))
    file.write_bytes(file.read_bytes()[:-50])
    for reader in ("resume", "export"):
        said = made.call(*READERS[reader])
        assert one_error(said) is None, said
        assert "step-000002" in said.err or "no complete checkpoint" in said.err, said


@pytest.mark.parametrize("file", ("config.yaml", "metrics.jsonl"))
def test_every_reader(made: MadeRun, file: str) -> None:
    assert not list(_wrong(made, [file], ["a number of 6,000 digits"]))


# In front of the command that goes farthest with it.
_COVERING = [
    ("export", "runs/old/checkpoints/step-000002/manifest.json", "a link"),
    ("export", "runs/old/checkpoints/step-000002/manifest.json", "a folder"),
    ("checkpoints", "runs/old/checkpoints/step-000002/state", "a link in a circle"),
    ("reproduce", "runs/old/record.json", "a dead link"),
    ("config diff", "runs/old/plan.json", "a pipe"),
    ("resume", "runs/old/metrics.jsonl", "a socket"),
    ("generate", "exported/generation_config.json", "a pipe"),
    ("generate", "exported/model.safetensors", "a folder"),
    ("generate", "exported/config.json", "a number of 6,000 digits"),
]


@pytest.mark.parametrize(("reader", "file", "kind"), _COVERING)
def test_a_damage_of_each_kind(made: MadeRun, reader: str, file: str, kind: str) -> None:
    assert wrong_with(made, file, kind, (READERS | {"generate": COMMANDS["generate"]})[reader]) is None


@pytest.mark.full
@pytest.mark.timeout(3 * 3600)
def test_every_damage_for_every_reader(made: MadeRun) -> None:
    wrong = list(_wrong(made, FILES, DAMAGED))
    assert not wrong, "\n".join(wrong)


@pytest.mark.full
@pytest.mark.timeout(3 * 3600)
@pytest.mark.parametrize("kind", KINDS)
def test_every_file_that_is_none_for_every_reader(made: MadeRun, kind: str) -> None:
    wrong = list(_wrong(made, (*FILES, *FOLDERS), [kind]))
    assert not wrong, "\n".join(wrong)


@pytest.mark.full
@pytest.mark.timeout(3 * 3600)
def test_every_damage_of_an_exported_model(made: MadeRun) -> None:
    made.restore()
    files = sorted(path.relative_to(made.place).as_posix() for path in (made.place / "exported").iterdir())
    told = (
        wrong_with(made, file, damage, COMMANDS["generate"])
        for file in files
        for damage in (*DAMAGED, *KINDS)
    )
    wrong = [each for each in told if each]
    assert files and not wrong, "\n".join(wrong)


def _wrong(made: MadeRun, files: Iterable[str], damages: Iterable[str]) -> Iterator[str]:
    for file in files:
        for damage in damages:
            for command in READERS.values():
                if said := wrong_with(made, f"runs/old/{file}", damage, command):
                    yield said
