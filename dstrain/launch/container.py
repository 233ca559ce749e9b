"""Runs a dstrain command in the container image, as ``launch/docker.sh`` does."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from dstrain.config.files import packaged
from dstrain.errors import DstrainError

_SECONDS = 30


def container_script() -> Path:
    """``launch/docker.sh``. Raises DstrainError where it is missing."""
    return packaged("launch/docker.sh")


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
            hint="install one, or remove --image",
        )
    missing = _why_not(engine, image)
    if missing is not None:
        raise DstrainError(
            f"{engine} has no image {image}: {missing}",
            where="--image",
            hint="get it (docker pull, docker load, docker build), or choose another with --image NAME",
        )
    return ["bash", str(container_script()), *arguments], {**environ, "DOCKER": engine, "IMAGE": image}


def refuse_unseen(paths: Iterable[tuple[str, str]], environ: Mapping[str, str] = os.environ) -> None:
    """Raises DstrainError for a path (by the choice that holds it) that the container would not see."""
    # docker.sh shows the current folder as /work.
    mounted = [Path("/work"), *(Path(place) for place in environ.get("MOUNT", "").split(":") if place)]
    for key, value in paths:
        path = Path(value).expanduser()
        if path.is_absolute() and not any(path.is_relative_to(place) for place in mounted):
            raise DstrainError(
                f"the container can't see {path}",
                where=key,
                hint=f"put MOUNT={path.parent} in front of the command to mount that folder",
            )


def _why_not(engine: str, image: str) -> str | None:
    """What the engine says where it can't give the image; None where it can."""
    try:
        done = subprocess.run(
            [engine, "image", "inspect", image],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_SECONDS,
            check=False,
        )
    except OSError as error:
        return str(error.strerror)
    except subprocess.TimeoutExpired:
        return f"no answer in {_SECONDS} s"
    if done.returncode == 0:
        return None
    said = done.stderr.decode(errors="replace").strip().splitlines()
    return said[-1] if said else f"exit code {done.returncode}"
