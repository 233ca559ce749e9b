"""What is released: the wheel, built from the source distribution, installed, and run where there is no checkout.

No package is fetched: the new environment sees the libraries of the one that runs the tests, but not its dstrain.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import dstrain

# All that a wheel puts into site-packages; no tools/, tests/ or benchmarks/.
ROOTS = ("dstrain/", f"dstrain-{dstrain.__version__}.dist-info/")
DATA = [
    "dstrain/py.typed",
    "dstrain/config/deepspeed_keys.json",
    "dstrain/ds_configs/base.json",
    "dstrain/ds_configs/recipes/quickstart.yaml",
    "dstrain/launch/docker.sh",
]
Run = Callable[..., str]


def run(
    *command: str | Path, cwd: Path, environment: dict[str, str] | None = None, timeout: float = 120
) -> str:
    """What it prints. It must end well."""
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    return done.stdout


def build(source: Path, to: Path, target: str) -> Path:
    """Build the ``wheel`` or the ``sdist`` of a folder with the build backend that pyproject.toml names."""
    run(sys.executable, "-m", "hatchling", "build", "-t", target, "-d", to, cwd=source)
    [built] = to.iterdir()
    return built


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def unpacked(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, unpacked."""
    sdist = build(repository, tmp_path_factory.mktemp("sdist"), "sdist")
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return folder / f"dstrain-{dstrain.__version__}"


@pytest.fixture(scope="module")
def wheel(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(unpacked, tmp_path_factory.mktemp("wheel"), "wheel")


@pytest.fixture(scope="module")
def bin_folder(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the ``dstrain`` command of a new environment lies."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    python = folder / "bin" / "python"
    offline = ("--no-deps", "--no-index", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "--python", python, "install", *offline, wheel, cwd=folder)
    [site_packages] = folder.glob("lib/python*/site-packages")
    # Python reads no .pth file in a folder that is named by a .pth file: an editable dstrain there stays unseen.
    libraries = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    (site_packages / "libraries.pth").write_text("".join(f"{path}\n" for path in libraries))
    return folder / "bin"


@pytest.fixture
def run_installed(bin_folder: Path, tmp_path: Path, materials: Path) -> Run:
    """Run a command of the new environment in a folder with ``model`` and ``text.jsonl``."""
    for name in ("model", "text.jsonl"):
        (tmp_path / name).symlink_to(materials / name)
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_"))
    }
    environment |= {"PATH": f"{bin_folder}:/usr/bin:/bin", "DS_ACCELERATOR": "cpu", "HOME": str(tmp_path)}

    def call(program: str, *arguments: str) -> str:
        return run(bin_folder / program, *arguments, cwd=tmp_path, environment=environment)

    return call


def test_the_wheel_holds_the_package_and_its_data(wheel: Path, repository: Path) -> None:
    """All of it: hatchling leaves out what .gitignore names, as it did with dstrain/runs for "runs/"."""
    names = set(contents(wheel))
    package = repository / "dstrain"
    source = {
        str(path.relative_to(repository))
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert not source - names
    assert not set(DATA) - names
    assert not [name for name in names if not name.startswith(ROOTS) or "__pycache__" in name]


def test_the_wheel_of_the_checkout_is_the_same(wheel: Path, repository: Path, tmp_path: Path) -> None:
    """So nothing is missing in the source distribution."""
    assert contents(build(repository, tmp_path, "wheel")) == contents(wheel)


def test_the_source_distribution_holds_what_the_wheel_is_built_from(unpacked: Path) -> None:
    found = {path.name for path in unpacked.iterdir()}
    assert {"dstrain", "ds_configs", "pyproject.toml", "README.md", "LICENSE"} <= found
    assert not found & {"tests", "tools", "benchmarks", ".venv", "runs"}


def test_what_is_imported_is_the_wheel(run_installed: Run, bin_folder: Path) -> None:
    found = run_installed("python", "-c", "import dstrain; print(dstrain.__file__)")
    assert Path(found.strip()).is_relative_to(bin_folder.parent)
    # Neither of them is part of a wheel; the checkout holds both.
    hidden = "import importlib.util as u; print([n for n in ('tools', 'tests') if u.find_spec(n)])"
    assert run_installed("python", "-c", hidden).strip() == "[]"


def test_version(run_installed: Run) -> None:
    assert run_installed("dstrain", "--version").split()[-1] == dstrain.__version__


def test_plan(run_installed: Run) -> None:
    """With the recipe that comes with dstrain, on data of one's own."""
    plan = json.loads(
        run_installed("dstrain", "plan", "--zero", "2", "--pipeline", "4", "--data", "text.jsonl", "--json")
    )
    assert plan["layout"]["pipeline"] == 4


def test_config_schema(run_installed: Run) -> None:
    assert "zero" in json.loads(run_installed("dstrain", "config", "schema"))["properties"]


@pytest.mark.heavy
def test_run_of_two_ranks(run_installed: Run, tmp_path: Path) -> None:
    """Through the launcher, so that each rank imports the wheel too."""
    out = run_installed(
        *("dstrain", "run", "--model", "model", "--data", "text.jsonl", "--zero", "1", "--pipeline", "2"),
        *("--seq-len", "32", "--global-batch", "4", "--micro-batch", "2", "--steps", "2", "--name", "short"),
        *("--set", "validation=0.2", "--set", "eval_samples=4", "--set", "sample_tokens=4"),
    )
    assert "validation loss" in out
    records = (tmp_path / "runs" / "short" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(record)["step"] for record in records] == [0, 1, 2]
