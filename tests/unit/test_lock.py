"""constraints.txt and requirements/, which `make lock` writes, against what pyproject.toml asks for."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hatchling.metadata.core import ProjectMetadata
from hatchling.plugin.manager import PluginManager
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.pins import on_linux, read_pins, versions
from tools.lock import UNIVERSAL

PYTHONS = ["3.10", "3.11", "3.12", "3.13", "3.14"]
LOCKS = ["build.txt", "torch.txt", "runtime.txt", "extras.txt"]
AGAIN = "pyproject.toml was changed: run `make lock`"


@pytest.fixture(scope="module")
def metadata() -> ProjectMetadata[Any]:
    return ProjectMetadata(str(Path(__file__).resolve().parents[2]), PluginManager())


@pytest.fixture
def extras(metadata: ProjectMetadata[Any]) -> list[str]:
    return [one for extra in metadata.core.optional_dependencies.values() for one in extra]


def unmet(wanted: Iterable[str], found: dict[str, str], python: str) -> list[str]:
    """Those of ``wanted`` that have no version, or one outside of their range."""
    requirements = [Requirement(one) for one in wanted]
    return [
        str(one)
        for one in requirements
        if (one.marker is None or one.marker.evaluate(on_linux(python)))
        # dstrain[other extra] stands for what that extra lists.
        and one.name != "dstrain"
        and not one.specifier.contains(found.get(canonicalize_name(one.name), "0"), prereleases=True)
    ]


def test_what_is_unmet_is_seen() -> None:
    found = {"a": "2.0", "b": "0.5"}
    assert unmet(["a>=1", "A<3", "c ; python_version < '3.10'"], found, "3.10") == []
    assert unmet(["a<2", "b>=1", "c>=1"], found, "3.10") == ["a<2", "b>=1", "c>=1"]


def test_the_lowest_python_is_that_of_the_package(metadata: ProjectMetadata[Any]) -> None:
    assert metadata.core.requires_python == f">={UNIVERSAL[UNIVERSAL.index('--python-version') + 1]}"


@pytest.mark.parametrize("python", PYTHONS)
def test_the_constraints_cover_pyproject(
    python: str, repository: Path, metadata: ProjectMetadata[Any], extras: list[str]
) -> None:
    found = versions(repository / "constraints.txt", python)
    wanted = [*metadata.core.dependencies, *extras, *metadata.build.requires]
    assert not unmet(wanted, found, python), AGAIN


@pytest.mark.parametrize("python", PYTHONS)
def test_the_hashed_files_cover_pyproject(
    python: str, repository: Path, metadata: ProjectMetadata[Any], extras: list[str]
) -> None:
    build, torch, runtime, more = (versions(repository / "requirements" / name, python) for name in LOCKS)
    assert not unmet(metadata.core.dependencies, torch | runtime, python), AGAIN
    assert not unmet(extras, torch | runtime | more, python), AGAIN
    assert not unmet(metadata.build.requires, build, python), AGAIN
    assert not runtime.keys() & more.keys(), "extras.txt is installed together with runtime.txt"


@pytest.mark.parametrize("python", PYTHONS)
def test_the_hashed_files_agree_with_the_constraints(python: str, repository: Path) -> None:
    pinned = versions(repository / "constraints.txt", python)
    found = [versions(repository / "requirements" / name, python) for name in LOCKS]
    # For each file, too: two of them may hold one package.
    assert [file.items() - pinned.items() for file in found] == [set()] * len(LOCKS)
    assert set().union(*found) == pinned.keys()


def test_nothing_but_torch_and_cuda_depends_on_the_build_of_torch(repository: Path) -> None:
    """Whoever takes torch from elsewhere installs runtime.txt, and no CUDA with it."""
    for name in ("build.txt", "runtime.txt", "extras.txt"):
        names = {pin.name for pin in read_pins(repository / "requirements" / name)}
        assert not [one for one in names if re.match("torch$|triton|nvidia-(?!ml-py)|cuda-", one)]


@pytest.mark.parametrize("name", LOCKS)
def test_every_package_has_hashes(name: str, repository: Path) -> None:
    for pin in read_pins(repository / "requirements" / name):
        assert pin.hashes, pin.requirement
        assert all(re.fullmatch("sha256:[0-9a-f]{64}", one) for one in pin.hashes), pin.requirement


@pytest.mark.parametrize("name", ["constraints.txt", *(f"requirements/{name}" for name in LOCKS)])
def test_no_registry_is_named(name: str, repository: Path) -> None:
    assert not re.search(
        "://|^ *-|--index|--find-links", re.sub(" +--hash=", "", (repository / name).read_text())
    )
