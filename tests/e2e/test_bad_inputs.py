"""What a user gets wrong: each mistake gets one message with a place, a reason and a way out, and starts nothing."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dstrain.config.loader import load_config
from dstrain.config.schema import field_names
from tests.support.bad_inputs.adapters import ADAPTERS
from tests.support.bad_inputs.files import DEEPSPEED, HOSTFILES, JSON, NO_FILES, YAML
from tests.support.bad_inputs.layouts import LAYOUTS
from tests.support.bad_inputs.row import FIFO, GOOD, BadInput
from tests.support.bad_inputs.sources import COMMANDS, DATA, MODELS, NAMES
from tests.support.bad_inputs.tools import CONFIGS, DESCRIBED
from tests.support.bad_inputs.values import KEYS_WITH_A_WRONG_TYPE, VALUES
from tests.support.e2e import Child, Said, one_message

TABLES = (
    ADAPTERS,
    COMMANDS,
    VALUES,
    YAML,
    NO_FILES,
    HOSTFILES,
    JSON,
    DEEPSPEED,
    LAYOUTS,
    MODELS,
    DATA,
    NAMES,
    DESCRIBED,
    CONFIGS,
)
BAD_INPUTS: dict[str, BadInput] = {name: row for table in TABLES for name, row in table.items()}

_STARTS = ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system", "os.exec", "os.spawn")
_started: list[tuple[str, Any]] = []
_prepared: set[Path] = set()  # caches that know the good arguments' model and data


def _listen(event: str, arguments: tuple[Any, ...]) -> None:
    if event in _STARTS:
        _started.append((event, arguments[0] if arguments else None))


sys.addaudithook(_listen)


def _no_run(*arguments: object, **options: object) -> None:
    raise AssertionError("a run is started")


@pytest.fixture
def looked(
    cache: Path, materials: Path, dstrain_here: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[str]]:
    """The modules that are run in processes of their own; here they are forks of a server that runs already.

    The good arguments alone need none: their model is measured, and their data are prepared.
    """
    if cache not in _prepared:
        text = str(materials / "text.jsonl")
        assert dstrain_here("plan", *[text if word == "text.jsonl" else word for word in GOOD]).code == 0
        _prepared.add(cache)
    modules: list[str] = []

    def start(module: str, *arguments: Any) -> Any:
        modules.append(module)
        return Child(module, *arguments)

    monkeypatch.setattr("dstrain.child_process.ChildProcess", start)
    yield modules


def write(place: Path, files: Any) -> None:
    for name, content in files.items():
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            path.mkdir()
        elif content is FIFO:
            os.mkfifo(path)
        elif isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, str) and content.startswith("-> "):
            path.symlink_to(content.removeprefix("-> "))
        elif isinstance(content, str):
            path.write_text(content, encoding="utf-8")
        else:
            path.write_text(json.dumps(content), encoding="utf-8")


def entries(place: Path) -> set[str]:
    return {str(path.relative_to(place)) for path in place.rglob("*")}


def check(said: Said, row: BadInput) -> None:
    """One message with exit code 2: the place and the reason, then the hint."""
    one_message(said, [])
    assert len(said.err.splitlines()) < 10
    assert all(sign.isprintable() or sign == "\n" for sign in said.err), said.err
    told, _, hint = said.err.partition("\n  hint: ")
    if told.startswith(("Usage:", "Try ")):  # click's own: what helps stands in front, or in the message
        hint = told
    assert row.place and row.place in told, said.err
    assert row.reason and row.reason in told, said.err
    assert row.hint and row.hint in hint, said.err


def test_there_are_enough() -> None:
    assert len(BAD_INPUTS) == sum(len(table) for table in TABLES) >= 200
    assert set(field_names()) == KEYS_WITH_A_WRONG_TYPE


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input(
    name: str,
    place: Path,
    materials: Path,
    looked: list[str],
    dstrain_here: Callable[..., Said],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    row, text = BAD_INPUTS[name], str(materials / "text.jsonl")
    monkeypatch.setattr("dstrain.api.launch_attempt.supervise", _no_run)
    write(place, row.files)
    for variable, value in row.environment.items():
        monkeypatch.setenv(variable, value)
    before = entries(place)
    _started.clear()
    # By its own path: the same words have the same tokens then, which are prepared once.
    said = dstrain_here(*[text if word == "text.jsonl" else word for word in row.arguments])
    assert not _started, "nothing is started"
    check(said, row)
    assert not said.out
    assert looked == list(row.looked)
    assert entries(place) == before, "nothing was made"


@pytest.mark.parametrize(
    "name",
    ["an unknown flag", "a flag without its value", "steps: many", "--config: a pipe", "3 stages on 4 slots"],
)
def test_in_a_process_of_its_own(name: str, place: Path, dstrain: Callable[..., Said]) -> None:
    row = BAD_INPUTS[name]
    write(place, row.files)
    before = entries(place)
    said = dstrain(*row.arguments)
    check(said, row)
    assert not said.out
    assert entries(place) == before


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        (b"\xef\xbb\xbfsteps: 3\n", 3),
        (b"steps: 3\r\n", 3),
        (b"\r\n# a comment\r\nsteps: 3", 3),
        (b"steps: &n 3\nkeep: *n\n", 3),
    ],
    ids=["byte order mark", "lines of Windows", "no end of line", "an alias"],
)
def test_what_looks_odd_and_is_right(text: bytes, steps: int, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes(text)
    assert load_config(config_file=str(tmp_path / "c.yaml")).config.steps == steps
