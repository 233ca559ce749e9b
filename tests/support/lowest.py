"""An environment with the lowest versions of dstrain's dependencies that pyproject.toml allows, made by uv.

torch is the exception: PyPI's wheels for Linux bring gigabytes of CUDA, so an older one takes too long to try.
The one that runs the tests is seen from the new environment, too.
"""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.pins import versions

# What runs the tests there, in the versions of constraints.txt.
_RUNNERS = ("hypothesis", "jsonschema", "pytest", "pytest-timeout", "pytest-xdist")
# Lowest versions were never built for newer compilers. DeepSpeed has no wheels, and is pinned nearly to the digit.
_WHEELS = ("--only-binary", ":all:", "--no-binary", "deepspeed")
_PART_OF_TORCH = re.compile("torch$|triton$|nvidia-(?!ml-py)|cuda-")


def uv(*arguments: str | Path, cwd: Path) -> str:
    """What it prints. Raises AssertionError, with what it says, where it fails."""
    command = [sys.executable, "-m", "uv", "--quiet", "--no-progress", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout


def lowest_versions(repository: Path, folder: Path, python: str, more: Iterable[str] = ()) -> Path:
    """A file with the lowest versions of what pyproject.toml names, and the newest of what those need.

    Args:
        folder: where it is written.
        python: such as ``3.11``.
        more: requirements beside dstrain's, in their newest versions.
    """
    (folder / "no-torch.txt").write_text("torch\n")
    options: list[str | Path] = ["--python-version", python, "--excludes", folder / "no-torch.txt", *_WHEELS]
    options += ["--no-annotate", "--no-header"]
    lowest = folder / f"lowest-{python}.txt"
    project = repository / "pyproject.toml"
    lowest.write_text(uv("pip", "compile", project, "--resolution", "lowest-direct", *options, cwd=folder))
    (folder / "more.in").write_text("".join(f"{one}\n" for one in more))
    both = folder / f"all-{python}.txt"
    both.write_text(uv("pip", "compile", lowest, folder / "more.in", *options, cwd=folder))
    return both


def make_environment(repository: Path, folder: Path) -> Path:
    """The Python of a new environment with the lowest versions; dstrain itself is not in it. About a minute."""
    running = f"{sys.version_info.major}.{sys.version_info.minor}"
    pinned = versions(repository / "constraints.txt", running)
    runners = [f"{name}=={pinned[name]}" for name in _RUNNERS]
    requirements = lowest_versions(repository, folder, running, [*runners, *_needed_by_torch()])
    environment = folder / "environment"
    uv("venv", "--python", sys.executable, environment, cwd=folder)
    python = environment / "bin" / "python"
    # Without dependencies: all of them are named, and DeepSpeed's torch would come along.
    uv("pip", "install", "--python", python, "--no-deps", "--requirements", requirements, cwd=folder)
    [site_packages] = environment.glob("lib/python*/site-packages")
    for distribution in importlib.metadata.distributions():
        if _PART_OF_TORCH.match(canonicalize_name(distribution.name)):
            _show(distribution, site_packages)
    uv("pip", "check", "--python", python, cwd=folder)
    return python


def _needed_by_torch() -> list[str]:
    found = [Requirement(one) for one in importlib.metadata.requires("torch") or []]
    return [
        f"{one.name}{one.specifier}"
        for one in found
        if (one.marker is None or one.marker.evaluate({"extra": ""}))
        and not _PART_OF_TORCH.match(canonicalize_name(one.name))
    ]


def _show(distribution: importlib.metadata.Distribution, site_packages: Path) -> None:
    """Link what a distribution has put into its own site-packages, and copy what says that it is there."""
    for name in {file.parts[0] for file in distribution.files or [] if not file.is_absolute()} - {".."}:
        source, target = Path(str(distribution.locate_file(name))), site_packages / name
        if name.endswith(".dist-info"):
            shutil.copytree(source, target)
        elif not target.exists() and name != "__pycache__":
            target.symlink_to(source)
