"""A second build of the image is the first one, package by package."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.image.engine import BUILD_ARGUMENTS, SBOM, Engine

# A second build beside the first one, of the same hour: what no file pins would be the same in both.
pytestmark = [pytest.mark.full, pytest.mark.timeout(3600)]


def test_a_second_build_holds_the_same_packages(
    docker: Engine, image: str, repository: Path, tmp_path: Path
) -> None:
    """On a base with one more file no step is taken from the first build. What its mounts keep is used again, fetched
    packages and compiled operators; `--no-cache` would throw that away, and compile for minutes.
    """
    again, other_base = "localhost/dstrain:again", "localhost/dstrain:other-base"
    (tmp_path / "Dockerfile").write_text(f"FROM {docker.base}\nCOPY Dockerfile /again\n")
    docker.build(tmp_path, other_base)
    docker.build(docker.context(repository), again, *BUILD_ARGUMENTS, base=other_base)
    made = ("--format=%Y", "/opt/dstrain/pyvenv.cfg", "/var/lib/dpkg/info/pdsh.list")
    first, second = (
        docker.run("run", "--rm", "--network", "none", "--entrypoint", "stat", one, *made).split()
        for one in (image, again)
    )
    assert first[0] != second[0] and first[1] != second[1], "steps of the first build stand in the second"
    assert docker.packages(again) == docker.packages(image)
    bills = [
        docker.run("run", "--rm", "--network", "none", "--entrypoint", "cat", one, SBOM)
        for one in (image, again)
    ]
    assert bills[0] == bills[1]
