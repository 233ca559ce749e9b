"""A tiny model, a tiny text, and the command line, in this process or in one of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

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
    """Run the command line in this process: ``dstrain_here("plan", "--zero", "2")``."""

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

    def call(*arguments: str, timeout: float = 200) -> Said:
        done = subprocess.run(
            [sys.executable, "-m", "dstrain.cli.main", *arguments],
            cwd=place,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        return Said(done.returncode, done.stdout, done.stderr)

    return call
