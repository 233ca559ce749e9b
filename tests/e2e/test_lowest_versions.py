"""A slice of the suite with the lowest versions that pyproject.toml allows, so that its floors are true.

All but torch, which is the one at hand (see tests/support/lowest.py). Packages are fetched: `make test-lowest`.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from hatchling.metadata.core import ProjectMetadata
from hatchling.plugin.manager import PluginManager
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.support.lowest import lowest_versions, make_environment
from tests.support.pins import versions

# Of a machine that does ten other things; five minutes on two idle cores.
pytestmark = [pytest.mark.heavy, pytest.mark.timeout(3600)]

SLICE = [
    "tests/unit",
    "tests/data",
    "tests/model/test_model_layers.py",
    "tests/model/test_model_families_small.py",
    "tests/distributed/test_layouts.py::test_data_parallel_equals_ddp_and_gradient_accumulation",
    "tests/e2e/test_run.py::test_a_run_leaves_all_that_it_promises",
    "tests/e2e/test_run.py::test_metrics_hold_one_record_a_step",
    "tests/e2e/test_export.py::test_from_pretrained_gives_what_the_ranks_had",
    "tests/e2e/test_export.py::test_configuration_tokenizer_and_generation_come_along",
]
# What needs extras or tools that are not installed there, and what starts processes and uses none of the libraries.
# fmt: off
IGNORED = [
    f"tests/unit/test_{name}.py"
    for name in (
        "audit", "docs", "hook_choices", "installation", "lock", "sbom",
        "control_attacks", "control_fuzz", "control_server", "folder_lock", "forking", "imports", "launch_supervisor",
        "protocol", "record", "record_git", "record_secrets", "submit", "tables",
    )
]
# fmt: on


@pytest.mark.parametrize("python", ["3.10", "3.11"])
def test_each_floor_is_a_version_that_is_used(python: str, repository: Path, tmp_path: Path) -> None:
    """pyproject.toml names no version that what dstrain needs elsewhere rules out, or that cannot be installed."""
    found = versions(lowest_versions(repository, tmp_path, python), python)
    dependencies = ProjectMetadata(str(repository), PluginManager()).core.dependencies
    requirements = {canonicalize_name(one.name): one for one in map(Requirement, dependencies)}
    assert requirements.keys() - found.keys() == {"torch"}
    floors = {
        name: next(part.version for part in one.specifier if part.operator == ">=")
        for name, one in requirements.items()
        if name != "torch"
    }
    assert {name: Version(found[name]) for name in floors} == {n: Version(v) for n, v in floors.items()}


def test_a_slice_of_the_suite(repository: Path, tmp_path: Path) -> None:
    python = make_environment(repository, tmp_path)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {
        "PATH": f"{python.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(repository),
        "PYTHONDONTWRITEBYTECODE": "1",
        "DSTRAIN_CACHE": str(tmp_path / "cache"),
    }
    words = [
        *SLICE,
        *(f"--ignore={one}" for one in IGNORED),
    ]
    words += ["-n", "2", "--dist", "loadfile", "-m", "not heavy and not full and not torture"]
    words += ["-q", "-p", "no:cacheprovider", "--durations=5", "--basetemp", str(tmp_path / "base")]
    done = subprocess.run(
        [python, "-m", "pytest", *words], cwd=repository, env=environment, capture_output=True, text=True
    )
    print(done.stdout[-2000:])
    assert done.returncode == 0, f"{done.stdout[-8000:]}{done.stderr[-2000:]}"
