"""constraints.txt and the files of requirements/, read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


class Pin:
    """One version of a package, where it holds, and the hashes of its files."""

    def __init__(self, line: str) -> None:
        stated, *hashes = line.split(" --hash=")
        self.requirement = Requirement(stated)
        self.name = canonicalize_name(self.requirement.name)
        [specifier] = self.requirement.specifier
        assert specifier.operator == "==", line
        self.version = specifier.version
        self.hashes = hashes

    def holds(self, python: str) -> bool:
        """For a Python such as ``3.11``, on Linux and x86-64."""
        marker = self.requirement.marker
        return marker is None or marker.evaluate(on_linux(python))


def on_linux(python: str) -> dict[str, str]:
    """The environment of a Python such as ``3.11`` on Linux and x86-64, as markers see it."""
    return {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
    }


def read_pins(path: Path) -> Iterator[Pin]:
    text = re.sub(r"\s*\\\n\s*", " ", path.read_text())
    for line in text.splitlines():
        if line and not line.startswith("#"):
            yield Pin(line)


def versions(path: Path, python: str) -> dict[str, str]:
    """The version of each package for this Python. Raises AssertionError where there are two of one."""
    found: dict[str, str] = {}
    for pin in read_pins(path):
        if pin.holds(python):
            assert pin.name not in found, pin.requirement
            found[pin.name] = pin.version
    return found
