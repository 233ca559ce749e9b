"""An engine, and the image that it builds from this checkout."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.image.engine import BUILD_ARGUMENTS, Engine, NoEngineError, engine


@pytest.fixture(scope="session")
def docker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    try:
        with engine(tmp_path_factory.mktemp("docker")) as found:
            yield found
    except NoEngineError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def image(docker: Engine, repository: Path) -> str:
    tag = "localhost/dstrain:test"
    docker.build(docker.context(repository), tag, *BUILD_ARGUMENTS)
    return tag
