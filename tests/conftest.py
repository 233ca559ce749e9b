"""Nothing of a test is left in the user's home: caches go to a folder of this test run."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    patch = pytest.MonkeyPatch()
    patch.setenv("DSTRAIN_CACHE", str(tmp_path_factory.mktemp("cache")))
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
        patch.setenv(name, "1")


@pytest.fixture
def repository() -> Path:
    return Path(__file__).resolve().parents[1]
