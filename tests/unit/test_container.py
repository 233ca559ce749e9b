"""A dstrain command in the image, with a stand-in for the engine."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from dstrain.errors import DstrainError
from dstrain.launch.container import container_script, in_image, refuse_unseen

ENGINE = """#!/bin/sh
case "$*" in
    "image inspect there") exit 0 ;;
    "image inspect --format "*" there") echo sha256:abc ;;
    image*) echo "No such image: elsewhere" >&2; exit 1 ;;
    --version) echo Docker version 20.10 ;;
    run*) shift; printf '%s\\n' "$@" ;;
    *) exit 1 ;;
esac
"""


@pytest.fixture
def engine(tmp_path: Path) -> str:
    path = tmp_path / "engine"
    path.write_text(ENGINE)
    path.chmod(0o755)
    return str(path)


def test_the_command_reaches_the_image(tmp_path: Path, engine: str) -> None:
    argv, environment = in_image(
        "there", ["reproduce", "runs/a", "--seed", "5"], {"DOCKER": engine, "PATH": "/usr/bin:/bin"}
    )
    assert argv == ["bash", str(container_script()), "reproduce", "runs/a", "--seed", "5"]
    done = subprocess.run(argv, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    words = done.stdout.splitlines()
    assert words[-5:] == ["there", "reproduce", "runs/a", "--seed", "5"]
    assert "DSTRAIN_IMAGE=sha256:abc" in words


def test_an_image_that_is_not_here(engine: str) -> None:
    with pytest.raises(DstrainError, match="has no image elsewhere: No such image: elsewhere"):
        in_image("elsewhere", [], {"DOCKER": engine})


def test_an_engine_that_does_not_answer(tmp_path: Path) -> None:
    with pytest.raises(DstrainError, match="has no image there: No such file or directory"):
        in_image("there", [], {"DOCKER": str(tmp_path / "nothing")})


def test_what_the_container_would_not_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refuse_unseen({"data": "mine.jsonl", "model": "/work/model", "tokenizer": "bytes"}.items(), {})
    refuse_unseen({"data": "/texts/mine.jsonl"}.items(), {"MOUNT": "/models:/texts"})
    with pytest.raises(DstrainError, match="data: the container can't see "):
        refuse_unseen({"data": str(tmp_path / "mine.jsonl")}.items(), {})
    with pytest.raises(DstrainError, match="data: the container can't see /texts/mine"):
        refuse_unseen({"data": "/texts/mine.jsonl"}.items(), {"MOUNT": "/models"})


def test_no_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DstrainError, match="neither docker nor podman is installed"):
        in_image("there", [], {})
