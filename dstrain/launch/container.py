"""A dstrain command in the container image, as ``launch/docker.sh`` starts it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from dstrain.errors import DstrainError

_PACKAGE = Path(__file__).resolve().parents[1]
_SECONDS = 30


def container_script() -> Path:
    """``docker.sh``: inside the package when installed from a wheel, in ``launch/`` of a checkout."""
    for script in (_PACKAGE / "launch" / "docker.sh", _PACKAGE.parent / "launch" / "docker.sh"):
        if script.is_file():
            return script
    raise DstrainError("docker.sh is missing from this installation", hint="reinstall dstrain")


def in_image(
    image: str, arguments: Sequence[str], environ: Mapping[str, str] = os.environ
) -> tuple[list[str], dict[str, str]]:
    """The argv and the environment that run ``dstrain ARGUMENTS`` in this image, with this folder as its own.

    Raises:
        DstrainError: there is no engine, or no such image here.
    """
    engine = environ.get("DOCKER") or shutil.which("docker") or shutil.which("podman")
    if engine is None:
        raise DstrainError(
            "neither docker nor podman is installed",
            where="--image",
            hint="install one, or leave --image out",
        )
    if not _has(engine, image):
        raise DstrainError(
            f"there is no image {image} here",
            where="--image",
            hint="bring it here (docker pull, docker load), or --image NAME for another one",
        )
    return ["bash", str(container_script()), *arguments], {**environ, "DOCKER": engine, "IMAGE": image}


def _has(engine: str, image: str) -> bool:
    try:
        done = subprocess.run(
            [engine, "image", "inspect", image], capture_output=True, timeout=_SECONDS, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return False
    return done.returncode == 0
