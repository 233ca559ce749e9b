"""The software versions of a run: every package, Python, and dstrain's own source."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import re
from pathlib import Path

from dstrain.version import __file__ as VERSION_FILE
from dstrain.version import __version__


def packages() -> dict[str, str]:
    """The version of every installed package, by its normalised name (PEP 503), sorted."""
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if name:  # what an interrupted installation leaves behind has none
            # The first one of a name is the one that is imported.
            found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), distribution.version)
    return dict(sorted(found.items()))


def python_version() -> str:
    """Such as ``CPython 3.11.2``."""
    return f"{platform.python_implementation()} {platform.python_version()}"


def own_version() -> str:
    """The number, and a hash of the source: a checkout that was not updated has the same number."""
    root = Path(VERSION_FILE).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return f"{__version__} ({digest.hexdigest()[:8]})"
