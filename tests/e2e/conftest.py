"""A tiny model, a tiny text, and the command line, in this process or in one of its own."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.forking.program import Program

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 256,
}


@dataclass(frozen=True)
class Said:
    """What a command ended with."""

    code: int
    out: str
    err: str


def one_message(said: Said, words: Sequence[str]) -> None:
    """It ended with one message to the user, which holds these words."""
    assert said.code == 2, said
    assert "Traceback" not in said.err + said.out
    assert sum(line.startswith("error:") for line in said.err.lower().splitlines()) == 1, said.err
    assert len(said.err) < 1200, "one message"
    assert not [word for word in words if word not in said.err], said.err


@pytest.fixture(scope="session")
def repository_root() -> Path:
    return Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``model/`` (a Llama of 4 layers) and ``text.jsonl`` (40 documents of 200 bytes)."""
    folder = tmp_path_factory.mktemp("materials")
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(LLAMA))
    lines = [json.dumps({"text": f"{n:03d} " + "the quick brown fox. " * 9 + str(n * n)}) for n in range(40)]
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data and measured shapes, shared by all tests of this folder."""
    return tmp_path_factory.mktemp("e2e-cache")


@pytest.fixture
def place(
    tmp_path: Path, materials: Path, cache: Path, repository_root: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """An empty folder to stand in, with a CPU machine's environment; ``model`` and ``text.jsonl`` are there."""
    for name in ("model", "text.jsonl"):
        (tmp_path / name).symlink_to(materials / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DSTRAIN_CACHE", str(cache))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("COLUMNS", "200")
    path = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(repository_root), path])))
    yield tmp_path


@pytest.fixture
def dstrain_here(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Said]:
    """Run the command line in this process: ``dstrain_here("plan", "--zero", "2")``.

    What it runs in processes of their own is forked.
    """
    monkeypatch.setattr(
        "dstrain.api.child_process.subprocess", SimpleNamespace(PIPE=PIPE, DEVNULL=DEVNULL, Popen=Child)
    )

    def call(*arguments: str) -> Said:
        from dstrain.cli.main import main

        monkeypatch.setattr(sys, "argv", ["dstrain", *arguments])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        captured = capsys.readouterr()
        return Said(code, captured.out, captured.err)

    return call


@pytest.fixture
def dstrain(place: Path) -> Callable[..., Said]:
    """Run the command line in a process of its own."""

    def call(*arguments: str, timeout: float = 200, change: str = "") -> Said:
        return start(place, os.environ, *arguments, change=change).said(timeout)

    return call


def start(place: Path, environment: Mapping[str, str], *arguments: str, change: str = "") -> CommandLine:
    """Start the command line in a process of its own, in which first the code ``change`` is run."""
    program = ["-m", "dstrain.cli.main"]
    if change:
        program = ["-c", f"{change}\nfrom dstrain.cli.main import main\nmain()"]
    return CommandLine([sys.executable, *program, *arguments], cwd=place, env=environment)


class Child(Program):
    """What `dstrain.api.child_process` needs of ``Popen``."""

    def __new__(cls, argv: Sequence[str], **options: Any) -> Any:
        # It learns where the hub and its cache are when it is imported.
        return Popen(argv, **options) if "dstrain.model.weights.hub" in argv else super().__new__(cls)

    def __init__(self, argv: Sequence[str], *, env: Mapping[str, str], stdout: int | None, **_: Any) -> None:
        super().__init__(argv, cwd=os.getcwd(), env=env)
        self._speaks = stdout is None

    @property
    def stderr(self) -> list[str]:
        self.wait(200)
        if self._speaks:
            sys.stdout.write(self.out)
        return self.err.splitlines(keepends=True)

    @property
    def returncode(self) -> int | None:
        return self.poll()


class CommandLine(Program):
    """A command line that was started."""

    def said(self, timeout: float = 250) -> Said:
        """Wait for its end. Raises TimeoutError."""
        return Said(self.wait(timeout), self.out, self.err)
