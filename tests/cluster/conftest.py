"""Three hosts for all tests of this folder, and what a user has set there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cluster.hosts import Cluster
from tests.support.cluster.needs import require_cluster
from tests.support.cluster.plain_path import plain_python, plain_root
from tests.support.cluster.runs import lay_out
from tests.support.forking.program import HOOK


@pytest.fixture(scope="session")
def session_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    require_cluster()
    with Cluster(tmp_path_factory.mktemp("hosts") / "cluster", 3) as cluster:
        yield cluster


@pytest.fixture
def cluster(session_cluster: Cluster) -> Iterator[Cluster]:
    """n1, n2 and n3: up, in the network, and nothing runs there."""
    yield session_cluster
    session_cluster.restore()


@pytest.fixture(scope="session")
def real_environment(session_cluster: Cluster, cache: Path, repository: Path) -> dict[str, str]:
    """What a user of n1 has set, to run this checkout on CPUs. Nothing of it is there behind an ssh."""
    login = session_cluster.login_environment()
    return {
        **login,
        "PATH": os.pathsep.join([os.path.dirname(plain_python()), login["PATH"]]),
        "PYTHONPATH": str(plain_root()),
        "DSTRAIN_CACHE": str(cache),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
    }


@pytest.fixture(scope="session")
def environment(real_environment: dict[str, str]) -> dict[str, str]:
    """The same with forks in place of new interpreters: see tests/support/forking."""
    path = os.pathsep.join([str(HOOK), real_environment["PYTHONPATH"]])
    return {**real_environment, "PYTHONPATH": path}


@pytest.fixture(scope="module")
def shared_place(materials: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder on the hosts' shared disk with ``model`` and ``text.jsonl``, for the runs of one file."""
    place = tmp_path_factory.mktemp("site")
    lay_out(materials, place)
    return place
