"""A folder to run commands in, and the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.golden.commands import Process, Said, environment, make_place, start


@pytest.fixture(scope="session")
def environ(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """All of a command's environment; prepared data and measured shapes are shared by these tests."""
    return environment(tmp_path_factory.mktemp("golden-home"), tmp_path_factory.mktemp("golden-cache"))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return make_place(tmp_path)


@pytest.fixture
def started(place: Path, environ: dict[str, str]) -> Iterator[Callable[..., Process]]:
    """Start ``dstrain ARGUMENTS`` in `place`; what still runs at the end is killed."""
    processes: list[Process] = []

    def call(*arguments: str, real: bool | None = None, **variables: str) -> Process:
        processes.append(start(place, environ | variables, *arguments, real=real))
        return processes[-1]

    yield call
    for process in processes:
        if process.poll() is None:
            process.kill()


@pytest.fixture
def dstrain(started: Callable[..., Process]) -> Callable[..., Said]:
    """Run ``dstrain ARGUMENTS`` in `place` to its end."""

    def call(*arguments: str) -> Said:
        return started(*arguments).said()

    return call
